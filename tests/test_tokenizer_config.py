"""What a configuration beside a tokenizer.json changes, and tokenizers of every kind through the command."""

from __future__ import annotations

import base64
import json

import pytest

from llmctl.tokenization import training
from llmctl.tokenizer import Tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def bytes_with(tokens: list[str], **changes) -> str:
    """tokenizer.json of bytes with these special tokens behind <|endoftext|>, the first of them 257."""
    spec = json.loads(training.plain_bytes())
    spec["added_tokens"] += [{"id": 257 + i, "content": token, **FLAGS} for i, token in enumerate(tokens)]
    return json.dumps(spec | changes)


def around(front: list[str], back: list[str]) -> dict:
    """A post-processor that puts tokens around a text."""
    ids = {"<s>": 257, "</s>": 258, "[CLS]": 257, "[SEP]": 258}
    row = [[{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens] for tokens in (front, back)]
    single = [*row[0], {"Sequence": {"id": "A", "type_id": 0}}, *row[1]]
    tokens = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in {*front, *back}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


@pytest.mark.parametrize("stands", [([], []), (["<s>"], []), (["<s>"], ["</s>"])])
@pytest.mark.parametrize("flag", [False, True])
def test_a_tokenizer_json_says_itself_what_stands_around(flag, stands, tmp_path, in_transformers, caplog):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": flag, "add_eos_token": flag, **NAMES}
    (tmp_path / "tokenizer.json").write_text(bytes_with(["<s>", "</s>"], post_processor=around(*stands)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level("INFO", logger="llmctl"):
        ours = Tokenizer.load(tmp_path)
    assert ours.json == (tmp_path / "tokenizer.json").read_text()
    front, back = [257] * len(stands[0]), [258] * len(stands[1])
    expected = [*front, 97, *back]
    assert ours.encode("a") == expected == transformers.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"]
    assert in_transformers(ours)("a")["input_ids"] == expected
    assert ours.encode_documents(["a"])[0].tolist() == [*front, 97, 258]
    said = [role for role in ("bos", "eos") if f"add_{role}_token" in caplog.text]
    assert said == [role for role, ids in (("bos", front), ("eos", back)) if bool(ids) != flag]


def test_an_encoder_without_a_configuration(in_transformers):
    """bert-base-uncased's own configuration names no token."""
    text = bytes_with(["[CLS]", "[SEP]", "[MASK]", "[PAD]"], post_processor=around(["[CLS]"], ["[SEP]"]))
    ours = Tokenizer(text, {"do_lower_case": True})
    assert (ours.cls_id, ours.sep_id, ours.mask_id, ours.pad_id) == (257, 258, 259, 260)
    assert ours.document_edges == ([257], [258]) and not ours.adds_bos
    assert in_transformers(ours).mask_token_id == 259


def test_edges_of_a_vocabulary_without_letters():
    spec = json.loads(bytes_with(["<s>", "</s>"], post_processor=around(["<s>"], ["</s>"])))
    model = {"type": "WordLevel", "vocab": {"0": 0, "1": 1}, "unk_token": "none"}
    tokens = [{"id": 2 + i, "content": text, **FLAGS} for i, text in enumerate(["<s>", "</s>"])]
    processor = json.loads(json.dumps(spec["post_processor"]).replace("257", "2").replace("258", "3"))
    parts = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}}
    changes = {"model": model, "added_tokens": tokens, "post_processor": processor, "decoder": None, **parts}
    tokenizer = Tokenizer(json.dumps(spec | changes), NAMES)
    assert tokenizer.document_edges == ([2], [3]) and tokenizer.encode("01") == [2, 0, 1, 3]


@pytest.mark.parametrize("edges", [(["<s>"], ["</s>"]), ([], ["</s>"])])
def test_eos_never_stands_twice(edges):
    ours = Tokenizer(bytes_with(["<s>", "</s>"], post_processor=around(*edges)), NAMES)
    ids, offsets = ours.encode_documents(["a", ""])
    one = [257] * len(edges[0])
    assert ids.tolist() == [*one, 97, 258, *one, 258] and offsets.tolist() == [0, len(one) + 2, 2 * len(one) + 3]


def test_gpt_neox(in_transformers):
    """The tokenizer.json of GPT-NeoX, Pythia and Mamba: NFC first, runs of spaces as added tokens, which are no special ones."""
    spec = json.loads(Tokenizer.train_bpe(["def f(x):\n    return x\n" * 20], 300).json)
    spec["normalizer"] = {"type": "NFC"}
    spec["pre_tokenizer"] = spec["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    n = len(spec["model"]["vocab"])
    runs = [" " * width for width in range(24, 1, -1)]
    flags = {**FLAGS, "special": False, "normalized": True}
    spec["added_tokens"] += [{"id": n + i, "content": run, **flags} for i, run in enumerate(runs)]
    ours = Tokenizer(json.dumps(spec), {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    theirs = in_transformers(ours, "gpt_neox")
    for text in ("x" + " " * 30 + "y", "  e\u0301 \u212b", "def f(x):\n    return x<|endoftext|>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        plain = text.replace("<|endoftext|>", "")
        assert ours.encode_documents([plain])[0].tolist() == [*theirs(plain)["input_ids"], ours.eos_id]
        assert ours.decode(ours.encode(plain)) == plain.replace("e\u0301", "é").replace("\u212b", "Å")
    assert ours.encode(" " * 24) == [n]


def write_wordpiece(directory):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "."]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")


def write_ranks(directory):
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    (directory / "cl100k.tiktoken").write_bytes(b"".join([*lines, base64.b64encode(b"the") + b" 256\n"]))


def write_byte_pairs(directory):
    spec = json.loads(training.byte_level_bpe(["the cats sat." * 9], 270))["model"]
    (directory / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (directory / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in spec["merges"]))


@pytest.mark.parametrize("write", [write_wordpiece, write_ranks, write_byte_pairs])
def test_save_tokenizer_converts(write, tmp_path, llmctl):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "old").mkdir()
    write(tmp_path / "old")
    llmctl("tokenize", "-", "--tokenizer", "old", "--save-tokenizer", "new", "-o", "a.arrow", input="the cats sat.\n")
    ours = Tokenizer.load(tmp_path / "old")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert saved("the cats sat.")["input_ids"] == ours.encode("the cats sat.") and len(saved) == ours.vocab_size
    (tmp_path / "new" / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path / "new").encode("the cats sat.") == ours.encode("the cats sat.")


def test_a_broken_tokenizer_is_one_line(tmp_path, llmctl):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    result = llmctl("tokenize", "-", "--tokenizer", "tokenizer.model", "-o", "a.arrow", input="x", code=1)
    assert "error: tokenizer.model: not a SentencePiece model" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 2
