"""The native encoder gives the ids of the `tokenizers` library, and for GPT-2 those of tiktoken."""

from __future__ import annotations

import copy
import json
import random
import unicodedata

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.tokenization import bulk, byte_level, training
from llmctl.tokenizer import Tokenizer

FRONT, BACK = [1, 2], [3]
# Pieces at whose seams the patterns decide something.
FRAGMENTS = [
    *["'s", "'S", "'ſ", "'re", "'lL", "'", "’", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2028"],
    *[
        "a",
        "Z",
        "the",
        " the",
        "é",
        "e\u0301",
        "ſ",
        "1",
        "12345",
        "½",
        "٣",
        "你好",
        "🦙",
        "\U0001d7ce",
        "が",
        "か\u3099",
    ],
    *["!", "...", "=", "_", "\x00", "\u0301", "\u200d", "\u212b", "\U0002fa1d", "<|endoftext|>"],
    *["<call>", "<call>x", "<|end", "d|>", "ab", "|", "/", "HTTPServer", "ʰ", "ǅ", "\U000e0101"],
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=40).map("".join)
ADDED = [("<call>", False), ("<|end of|>", True), ("<call>x", False), ("ab", False), ("  ", False), ("|e", True)]


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    byte_level_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [step, byte_level_step]}


def added_tokens(first_id: int, normalized: bool) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": first_id + i, "content": text, "special": special, "normalized": normalized and not special, **flags}
        for i, (text, special) in enumerate(ADDED)
    ]


def variants() -> dict[str, dict]:
    """tokenizer.json of every kind that the native encoder takes, with one small vocabulary."""
    base = json.loads(training.byte_level_bpe([" ".join(FRAGMENTS) * 3 + __doc__ + " the then that hello" * 9], 400))
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    nfc = {"type": "NFC"}
    digits = {"type": "Digits", "individual_digits": True}
    cl100k, qwen2 = byte_level.CL100K_PATTERN, training.SPLIT_PATTERN
    changes = {
        "gpt2": {"pre_tokenizer": gpt2},
        "one word": {"pre_tokenizer": {**gpt2, "use_regex": False}},
        "cl100k": {"pre_tokenizer": split(cl100k, "Removed", invert=True)},
        "llama3": {"pre_tokenizer": split(cl100k), "model": {**base["model"], "ignore_merges": True, "merges": []}},
        "qwen2": {"pre_tokenizer": split(qwen2), "normalizer": nfc},
        "o200k": {"pre_tokenizer": split(byte_level.O200K_PATTERN)},
        "digits apart": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, gpt2]}},
        "space first": {"pre_tokenizer": {**gpt2, "add_prefix_space": True}},
        "added": {"pre_tokenizer": gpt2, "added_tokens": added_tokens(400, normalized=False)},
        "added, normalized": {"pre_tokenizer": gpt2, "added_tokens": added_tokens(400, normalized=True)},
        "added, nfc": {
            "pre_tokenizer": split(qwen2),
            "normalizer": nfc,
            "added_tokens": added_tokens(400, normalized=False),
        },
        "gpt-neox": {"pre_tokenizer": gpt2, "normalizer": nfc, "added_tokens": added_tokens(400, normalized=True)},
    }
    return {name: {**copy.deepcopy(base), **change} for name, change in changes.items()}


VARIANTS = variants()


def encoders(spec: dict):
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    native = bulk.encoder_for(tokenizer, FRONT, BACK)
    assert not isinstance(native, bulk.LibraryEncoder)
    return native, bulk.LibraryEncoder(tokenizer, FRONT, BACK)


def assert_same(encoder, reference, texts: list[str], threads: int = 1) -> None:
    documents = bulk.utf8(texts)
    ids, offsets = encoder.encode(documents, threads)
    expected_ids, expected_offsets = reference.encode(documents, None)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    np.testing.assert_array_equal(offsets, expected_offsets)
    np.testing.assert_array_equal(ids, expected_ids)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    return encoders(VARIANTS[request.param])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=8), threads=st.integers(1, 3))
def test_any_text(pair, texts, threads):
    assert_same(*pair, texts, threads)


BETWEEN = ["a{}b", "'{} ", "1{}!\n"]


@pytest.mark.parametrize(
    ("name", "context"),
    [
        *(("gpt2", context) for context in ["{}", *BETWEEN]),
        *(("qwen2", context) for context in ["{}", *BETWEEN]),
        *(("o200k", context) for context in ["{}", "A{}B {}'s"]),
        ("digits apart", "A{}B {}{}"),
    ],
)
def test_every_code_point(name, context):
    """Alone all of Unicode, between others as much of it as has letters."""
    stop = 0x110000 if context == "{}" else 0x34000
    points = [context.replace("{}", chr(point)) for point in range(stop) if not 0xD800 <= point < 0xE000]
    texts = ["".join(points[i : i + 64]) for i in range(0, len(points), 64)]
    assert_same(*encoders(VARIANTS[name]), texts)


def test_thread_count_changes_nothing(pair):
    rng = random.Random(7)
    texts = ["".join(rng.choices(FRAGMENTS, k=rng.randrange(2000))) for _ in range(60)]
    # Long ones are cut between threads, and are followed by short and empty ones.
    texts += ["".join(rng.choices(FRAGMENTS, k=200_000)), "", "a", " the" * 90_000, ""]
    assert_same(*pair, texts, threads=5)


def test_no_documents_and_empty_ones(pair):
    for texts in ([], [""], ["", ""], ["", "a", ""]):
        assert_same(*pair, texts, threads=2)


@pytest.mark.parametrize("character", ["a", " ", "-", "1", "é", "好"])
def test_a_huge_word_takes_no_quadratic_time(character):
    encoder, reference = encoders(VARIANTS["gpt2"])
    assert_same(encoder, reference, [character * 2_000_000])


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "added_tokens": added_tokens(400, normalized=False),
        },
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": split(r"\p{L}+")},
        {"pre_tokenizer": split(training.SPLIT_PATTERN, "MergedWithPrevious")},
        {"model": {"dropout": 0.5}},
        {"model": {"continuing_subword_prefix": "##"}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"model": {"byte_fallback": True}},
        {"added_tokens": [{**token, "lstrip": True} for token in added_tokens(400, normalized=False)]},
        {"added_tokens": [{**added_tokens(400, normalized=bool(i))[i]} for i in (0, 3)]},
    ],
)
def test_what_is_not_known_goes_to_the_library(change):
    spec = copy.deepcopy(VARIANTS["gpt2"])
    spec["model"].update(change.pop("model", {}))
    assert byte_level.native_model({**spec, **change}) is None


def test_a_vocabulary_without_all_bytes_goes_to_the_library():
    spec = copy.deepcopy(VARIANTS["one word"])
    spec["model"].update(vocab={"a": 0, "b": 1}, merges=[])
    assert byte_level.native_model(spec) is None


# tiktoken brings its own version of Unicode, so it is asked about characters that Python knows too.
KNOWN = st.characters(exclude_categories=["Cs", "Cn", "Co"])


@pytest.fixture(scope="module")
def gpt2(data) -> tuple[Tokenizer, tiktoken.Encoding]:
    ours = Tokenizer.load(data / "tokenizers" / "gpt2")
    ranks = {ours.token_bytes(token): token for token in range(50256)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    return ours, theirs


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(FRAGMENTS) | KNOWN, max_size=60).map("".join))
def test_gpt2_is_tiktokens(gpt2, text):
    ours, theirs = gpt2
    if all(unicodedata.category(character) != "Cn" for character in text):
        assert ours.encode_documents([text])[0].tolist() == [*theirs.encode_ordinary(text), 50256]


def test_gpt2_on_real_text(gpt2, data):
    ours, theirs = gpt2
    texts = [path.read_text() for path in sorted((data / "text").glob("*.txt"))]
    expected = [token for text in texts for token in [*theirs.encode_ordinary(text), 50256]]
    assert ours.encode_documents(texts, threads=2)[0].tolist() == expected


def test_gpt2_vectors(gpt2, data):
    """llama.cpp's vectors, every line."""
    texts = (data / "tokenizers" / "gpt-2.vectors.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (data / "tokenizers" / "gpt-2.vectors.out").read_text().split("\n")
    assert len(texts) > 40
    ids, offsets = gpt2[0].encode_documents(texts)
    for i, text in enumerate(texts):
        expected = [int(token) for token in lines[i].split()]
        assert ids[offsets[i] : offsets[i + 1] - 1].tolist() == expected, text
        assert gpt2[0].encode(text) == expected, text
