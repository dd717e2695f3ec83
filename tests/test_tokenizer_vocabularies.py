"""Vocabularies of plain text: BERT's and ESM's vocab.txt, and vocab.json with merges.txt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import UserError
from llmctl.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

RESIDUES = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>".split()
FRAGMENTS = [
    "don't",
    "Naïve",
    "ÜBER",
    "你好",
    "ﬁ",
    " ",
    "  ",
    "\n",
    "\x00",
    "\u200b",
    "12",
    "...",
    "[MASK]",
    "[SEP]",
    "##ing",
    "İ",
]
N = 300
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=30).map("".join)


def ids_for_training(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_documents([text])[0].tolist()


@pytest.fixture(scope="module")
def bert(data) -> Tokenizer:
    return Tokenizer.load(data / "tokenizers" / "bert")


BERT_CONFIGS = [
    {},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"tokenize_chinese_chars": False},
]


@pytest.mark.parametrize("config", BERT_CONFIGS, ids=str)
def test_bert_is_transformers(config, data, tmp_path, in_transformers):
    shutil.copy(data / "tokenizers" / "bert" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), **config)
    saved = in_transformers(ours, "bert")
    assert saved.mask_token_id == theirs.mask_token_id == ours.mask_id and len(saved) == len(theirs) == 30522

    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS)
    def check(text):
        assert ours.encode(text) == theirs(text)["input_ids"] == saved(text)["input_ids"]

    check()
    assert saved("one", "two") == theirs("one", "two")


def test_bert_on_real_text(bert, data):
    theirs = transformers.BertTokenizer(vocab=str(data / "tokenizers" / "bert" / "vocab.txt"))
    text = (data / "text" / "alice29.txt").read_text()
    expected = theirs(text)["input_ids"]
    assert ids_for_training(bert, text) == expected
    assert (expected[0], expected[-1], expected.count(102)) == (bert.cls_id, bert.sep_id, 1)


def test_facts_of_bert(bert):
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 100, 101, 102, 103)
    assert (bert.bos_id, bert.eos_id, bert.adds_bos) == (None, None, False)
    assert bert.special_ids == {0, 100, 101, 102, 103} and bert.document_edges == ([101], [102])
    assert bert.encode("[MASK]") == [101, 103, 102]
    assert 103 not in ids_for_training(bert, "[MASK]")
    assert bert.decode(bert.encode("the unaffable cat, who?")) == "the unaffable cat, who?"


def test_esm_is_transformers(tmp_path, in_transformers):
    (tmp_path / "vocab.txt").write_text("\n".join(RESIDUES))
    ours = Tokenizer.load(tmp_path / "vocab.txt")
    theirs = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    saved = in_transformers(ours, "esm")
    assert (ours.cls_id, ours.pad_id, ours.eos_id, ours.unk_id, ours.mask_id) == (0, 1, 2, 3, len(RESIDUES) - 1)

    @settings(max_examples=100, deadline=None)
    @given(text=st.lists(st.sampled_from([*RESIDUES, *"MKTJ mkt\n", "  ", "<", "[MASK]"]), max_size=20).map("".join))
    def check(text):
        assert ours.encode(text) == theirs(text)["input_ids"] == saved(text)["input_ids"]

    check()
    assert ids_for_training(ours, "MKTAY") == theirs("MKTAY")["input_ids"]
    assert ours.decode(ours.encode("MKTAY")) == "MKTAY"
    assert ids_for_training(ours, "MK<mask>").count(ours.mask_id) == 0


@pytest.fixture(scope="module")
def gpt2_files(some_texts, tmp_path_factory):
    """`gpt2_files(config, model_type, added, roberta)` makes a directory of GPT-2's two files, with a vocabulary of N tokens."""
    model = json.loads(Tokenizer.train_bpe(["Hello world, don't", *some_texts], N).json)["model"]
    words = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != "<|endoftext|>"]

    def make(
        config: dict | None = None, model_type: str | None = None, added: dict | None = None, roberta: bool = False
    ) -> Path:
        directory = tmp_path_factory.mktemp("byte-pairs")
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *words, "<mask>"] if roberta else [*words, "<|endoftext|>"]
        (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
        (directory / "merges.txt").write_text("\n".join(merges) + "\n")
        types = model_type and {"model_type": model_type}
        for name, value in (("tokenizer_config", config), ("config", types), ("added_tokens", added)):
            if value is not None:
                (directory / f"{name}.json").write_text(json.dumps(value))
        return directory

    return make


@pytest.mark.parametrize("model_type", ["roberta", "bart", "longformer", None])
def test_roberta_is_transformers(model_type, gpt2_files, in_transformers):
    directory = gpt2_files({"model_max_length": 512}, model_type, roberta=True)
    ours = Tokenizer.load(directory)
    theirs = transformers.RobertaTokenizer.from_pretrained(directory)
    saved = in_transformers(ours, model_type)
    for text in ("Hello world", " Hello  world", "", "naïve </s> x"):
        assert ours.encode(text) == theirs(text)["input_ids"] == saved(text)["input_ids"]
    assert theirs("one", "two")["input_ids"] == saved("one", "two")["input_ids"]
    assert (ours.bos_id, ours.eos_id, ours.cls_id, ours.sep_id, ours.pad_id) == (0, 2, 0, 2, 1)
    assert ours.document_edges == ([0], [2]) and ours.mask_id == ours.vocab_size - 1
    assert ids_for_training(ours, "a") == ours.encode("a")
    # The mask takes the space in front of it: it hides a word, and the space is part of that.
    assert (
        saved("a <mask> b")["input_ids"]
        == ours.encode("a <mask> b")
        == [0, *ours.encode("a")[1:2], ours.mask_id, *ours.encode(" b")[1:]]
    )


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "qwen2"])
def test_gpt2s_relatives(model_type, gpt2_files, in_transformers):
    configs = {
        "gpt2": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        "opt": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"},
        "qwen2": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None},
    }
    directory = gpt2_files(configs[model_type], added={"<|im_end|>": N} if model_type == "qwen2" else None)
    ours = Tokenizer.load(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    saved = in_transformers(ours, model_type)
    for text in ("Hello 12345 world", "e\u0301 don't  x", "a<|im_end|>b", ""):
        assert ours.encode(text) == theirs(text)["input_ids"] == saved(text)["input_ids"]
    assert ours.adds_bos == (model_type == "opt")


def test_added_tokens_and_their_flags(gpt2_files, in_transformers):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    decoder = {
        N: {**flags, "content": "<l>", "lstrip": True},
        N + 1: {**flags, "content": "<r>", "rstrip": True, "special": True},
        N + 3: {**flags, "content": "<w>", "single_word": True},
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder, "pad_token": "<pad>"}
    ours = Tokenizer.load(gpt2_files(config | {"additional_special_tokens": ["<more>", "<r>"]}))
    saved = in_transformers(ours, "gpt2")
    [a], [b], space_b = (ours.encode(text) for text in ("a", "b", " b"))
    assert ours.vocab_size == len(saved) == N + 6
    assert (ours.pad_id, ours.encode("<more>")) == (N + 4, [N + 5]) and saved.pad_token_id == N + 4
    assert {N + 1, N + 4, N + 5} <= ours.special_ids and ours.special_ids.isdisjoint([N, N + 3])
    assert ours.encode("a <l> b") == [a, N, *space_b]
    assert ours.encode("a <r> b") == [*ours.encode("a "), N + 1, b]
    assert N + 3 not in ours.encode("a<w>b") and N + 3 in ours.encode("a <w> b")
    for text in ("a <l> b", "a <r> b", "a<w>b <w> <more>", "x<pad>"):
        assert saved(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added": {"<x>": 12}}, "the added token '<x>' has the id 12, but the vocabulary gives that id to '-'"),
        ({"added": {"A": 60000}}, "the added token 'A' has the id 60000, but the vocabulary gives it the id"),
        ({"vocab": {"a": 0, "b": 2}}, "the vocabulary has a hole: no token has the id 1, but ids go up to 2"),
        ({"vocab": {"a": 0, "b": 0}}, "the tokens 'a' and 'b' have the same id 0"),
        ({"vocab": {"a": -1}}, "the token 'a' has the id -1"),
        ({"vocab": {"a": "x"}}, "the token 'a' has the id 'x'"),
        ({"vocab": {"a</w>": 0}}, "words end in </w>"),
        ({"vocab": {}}, "the vocabulary is empty"),
        ({"merges": "#version: 0.2\na b c\n"}, "merges.txt, line 2: expected two tokens, found 'a b c'"),
        ({"merges": "zzzzzzz a\n"}, "merges.txt, line 1: 'zzzzzzz' is not in vocab.json"),
        ({"merges": ""}, "merges.txt holds no merges"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message, gpt2_files):
    directory = gpt2_files({}, added=change.get("added"))
    if "vocab" in change:
        (directory / "vocab.json").write_text(json.dumps(change["vocab"]))
        (directory / "merges.txt").write_text("")
    if "merges" in change:
        (directory / "merges.txt").write_text(change["merges"])
    with pytest.raises(UserError) as error:
        Tokenizer.load(directory)
    assert message in error.value.message and str(directory) in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_one_file_of_the_pair(missing, gpt2_files):
    directory = gpt2_files()
    (directory / missing).unlink()
    with pytest.raises(UserError, match=missing):
        Tokenizer.load(directory)


def test_a_file_of_the_pair_stands_for_both(gpt2_files):
    directory = gpt2_files()
    assert Tokenizer.load(directory / "vocab.json").json == Tokenizer.load(directory).json
