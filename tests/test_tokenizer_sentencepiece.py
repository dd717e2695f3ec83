"""SentencePiece models give the ids of the sentencepiece package, and so does the tokenizer.json made of them."""

from __future__ import annotations

import io
import json
import random
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.errors import UserError
from llmctl.tokenization import charsmap, piece_model
from llmctl.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BPE = {"model_type": "bpe", "byte_fallback": True, **PLAIN}
T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
GEMMA_IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"}
SYMBOLS = {"user_defined_symbols": ["<sep>", "[INST]", "▁▁"], "control_symbols": ["<ctl>"]}
KINDS = {
    "llama": {**BPE, "split_digits": True, "allow_whitespace_only_pieces": True},
    "llama with symbols": {**BPE, **SYMBOLS},
    "gemma": {
        **BPE,
        **GEMMA_IDS,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["▁▁", "▁▁▁", "\n", "\n\n", "<b>"],
    },
    "t5": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", **T5_IDS},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, **PLAIN, **SYMBOLS},
    "bpe without bytes": {"model_type": "bpe", "normalization_rule_name": "nfkc"},
    "folded": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
    "characters": {"model_type": "char", **PLAIN},
}
FRAGMENTS = [" ", "  ", "   ", "\n", "\t", "a", "the", " the", "▁", "<s>", "</s>", "<unk>", "<0x41>", "<ctl>", "<sep>"]
FRAGMENTS += [
    "[INST]",
    "<b>",
    "é",
    "e\u0301",
    "½",
    "ﬁ",
    "\u200b",
    "\u00a0",
    "\u3000",
    "好",
    "🦙",
    "12",
    "Ⅳ",
    "--",
    "\r\n",
    "İ",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs", "Cn", "Co", "M"])).map("".join)


@pytest.fixture(scope="session")
def train(data):
    """`train(**settings)` gives the bytes of a model learnt from two books and a line of rare characters."""
    texts = [(data / "text" / name).read_text() for name in ("alice29.txt", "tinyshakespeare.txt")]
    lines = [line for text in texts for line in text[:60_000].split("\n") if line.strip()]
    lines += ["naïve café œuvre ½ ﬁne ① が ドア 你好 🦙 Ⅳ   spaced   out"] * 5

    def run(**changes) -> bytes:
        out = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, minloglevel=2, **{"vocab_size": 700, **changes}
        )
        return out.getvalue()

    return run


@pytest.fixture(scope="session")
def pairs(train, tmp_path_factory):
    """Of each kind our tokenizer and sentencepiece's."""
    made = {}
    for kind, changes in KINDS.items():
        path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
        path.write_bytes(train(**changes))
        (path.parent / "config.json").write_text(json.dumps({"model_type": kind.split()[0]}))
        made[kind] = Tokenizer.load(path.parent), spm.SentencePieceProcessor(model_file=str(path))
    return made


def own_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of documents without what stands around each; special tokens written in them stay text."""
    ids, offsets = tokenizer.encode_documents(texts)
    front, back = map(len, tokenizer.document_edges)
    return [ids[offsets[i] + front : offsets[i + 1] - back].tolist() for i in range(len(texts))]


def assert_same(pair, texts: list[str]) -> None:
    ours, theirs = pair
    for text, ids in zip(texts, own_ids(ours, texts)):
        expected = theirs.encode(text)
        if ids != expected and theirs.get_score(0) == 0 and is_tie(theirs, ids, expected):
            continue
        assert [theirs.id_to_piece(i) for i in ids] == [theirs.id_to_piece(i) for i in expected], text


def is_tie(theirs, ids: list[int], expected: list[int]) -> bool:
    """Whether two ways to take a text apart are as likely, to the float32 in which sentencepiece adds up."""
    texts = ["".join(map(theirs.id_to_piece, each)) for each in (ids, expected)]
    scores = [sum(map(theirs.get_score, each)) for each in (ids, expected)]
    return texts[0] == texts[1] and scores[0] == pytest.approx(scores[1], rel=1e-6)


EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@EVERY_KIND
def test_vectors(kind, pairs, data):
    """The inputs of llama.cpp's vectors; their ids are those of a vocabulary that is not here."""
    texts = (data / "tokenizers" / "llama-spm.vectors.inp").read_text().split("\n__ggml_vocab_test__\n")
    assert len(texts) > 40
    assert_same(pairs[kind], texts)


@EVERY_KIND
def test_real_text(kind, pairs, data):
    texts = (data / "text" / "botchan.txt").read_text().split("\n\n")[:400]
    assert_same(pairs[kind], texts)


@EVERY_KIND
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text(kind, pairs, text):
    # A text that is one symbol and nothing else: sentencepiece puts a lone space in front of it.
    if text in SYMBOLS["user_defined_symbols"]:
        text += "."
    assert_same(pairs[kind], [text])


@EVERY_KIND
def test_runs_and_repeats(kind, pairs):
    """Where several merges of the same rank overlap, the leftmost comes first."""
    choose = random.Random(3)
    texts = ["".join(choose.choices("ab -.\n", k=choose.randrange(40))) for _ in range(300)]
    assert_same(pairs[kind], [*texts, "-" * 100, " " * 100, "ababab" * 20])


@pytest.mark.parametrize("kind", ["t5", "bpe without bytes", "folded"])
def test_decomposed_text(kind, pairs):
    """Marks behind their letters, as file names of some systems have them."""
    words = ["Tiếng Việt ậ ữ", "naïve Ångström", "각 한국어", "がぎぐ パン", "žluťoučký kůň", "ｶﾞﾊﾟ", "हिन्दी", "العَرَبِيَّة"]
    assert_same(pairs[kind], words + [unicodedata.normalize("NFD", word) for word in words])


@EVERY_KIND
def test_text_comes_back(kind, pairs):
    ours, theirs = pairs[kind]
    for text in ("Hello, my dear world!", "a  b", " a"):
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        stream = ours.stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.flush() == theirs.decode(ids)


@EVERY_KIND
def test_what_we_save_gives_the_same_ids(kind, pairs, in_transformers, tmp_path):
    ours, theirs = pairs[kind]
    saved = in_transformers(ours, model_type=kind.split()[0] if kind.split()[0] in ("llama", "gemma", "t5") else None)
    texts = ["Hello world", " two  spaces ", "naïve 你好 🦙\n", "", "x</s>y"]
    for text in texts:
        assert saved(text)["input_ids"] == ours.encode(text)
    assert (saved.eos_token_id, saved.bos_token_id, saved.pad_token_id) == (ours.eos_id, ours.bos_id, ours.pad_id)
    assert len(saved) == ours.vocab_size
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.json, again.config) == (ours.json, ours.config)


@EVERY_KIND
def test_special_tokens_are_ids_in_a_prompt_and_text_in_a_corpus(kind, pairs):
    ours, theirs = pairs[kind]
    eos = theirs.id_to_piece(ours.eos_id)
    prompt = ours.encode(f"x{eos}y", add_special_tokens=False)
    assert prompt.count(ours.eos_id) == 1
    assert ours.eos_id not in own_ids(ours, [f"x{eos}y"])[0]


def test_edges(pairs):
    """BOS where llama has it, EOS where T5 has it, and both around a document for training, each once."""
    llama, gemma, t5 = (pairs[kind][0] for kind in ("llama", "gemma", "t5"))
    assert (llama.bos_id, llama.eos_id, llama.unk_id, llama.pad_id) == (1, 2, 0, None)
    assert llama.adds_bos and llama.encode("")[:1] == [1] and llama.document_edges == ([1], [2])
    assert (gemma.bos_id, gemma.eos_id, gemma.pad_id) == (2, 1, 0) and gemma.document_edges == ([2], [1])
    assert (t5.bos_id, t5.eos_id, t5.pad_id) == (None, 1, 0)
    assert t5.encode("")[-1:] == [1] and t5.document_edges == ([], [1])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_flags_for_bos_and_eos(bos, eos, train, tmp_path, in_transformers):
    (tmp_path / "tokenizer.model").write_bytes(train(**KINDS["llama"]))
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": bos, "add_eos_token": eos, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(tmp_path)
    plain = ours.encode("hello", add_special_tokens=False)
    assert ours.encode("hello") == [1] * bos + plain + [2] * eos == in_transformers(ours)("hello")["input_ids"]
    assert ours.adds_bos == bos and ours.document_edges == ([1] * bos, [2])


def test_sentinels_of_t5(pairs, in_transformers):
    ours, theirs = pairs["t5"]
    n = theirs.get_piece_size()
    assert ours.vocab_size == n + 100
    assert ours.encode("<extra_id_0>", add_special_tokens=False)[-1] == n + 99
    assert ours.encode("a <extra_id_99> b") == in_transformers(ours, "t5")("a <extra_id_99> b")["input_ids"]
    assert n in ours.encode("a <extra_id_99> b")


def test_sentinels_that_the_configuration_lists(train, tmp_path):
    """t5-small names its hundred sentinels once more, mT5 has none."""
    (tmp_path / "spiece.model").write_bytes(train(**KINDS["t5"]))
    names = [f"<extra_id_{number}>" for number in range(100)]
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "additional_special_tokens": names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert [tokenizer.encode(name, add_special_tokens=False)[-1] for name in names] == list(range(799, 699, -1))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MT5Tokenizer", "extra_ids": 0}))
    assert Tokenizer.load(tmp_path).vocab_size == 700


def test_special_tokens_stand_anywhere(train, tmp_path, in_transformers):
    """Llama's first configurations call them normalized; a chat has them in the middle of its text all the same."""
    (tmp_path / "tokenizer.model").write_bytes(train(**KINDS["llama"]))
    tokens = {
        role: {"content": text, "normalized": True} for role, text in (("bos_token", "<s>"), ("eos_token", "</s>"))
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **tokens}))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("<s>one</s><s>two", add_special_tokens=False)
    assert [token for token in ids if token in (1, 2)] == [1, 2, 1]
    assert in_transformers(tokenizer, "llama")("<s>one</s><s>two", add_special_tokens=False)["input_ids"] == ids


def test_turns_of_gemma_are_special(train, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(**{**KINDS["gemma"], "user_defined_symbols": ["<start_of_turn>", "<unused0>"]}))
    tokenizer = Tokenizer.load(path)
    turn = spm.SentencePieceProcessor(model_file=str(path)).piece_to_id("<start_of_turn>")
    assert tokenizer.encode("<start_of_turn>user<unused0>", add_special_tokens=False) == [
        turn,
        *tokenizer.encode("user<unused0>", add_special_tokens=False),
    ]
    assert turn in tokenizer.special_ids and turn + 1 not in tokenizer.special_ids


def test_a_cut_or_garbled_model_is_refused(train, tmp_path):
    whole = train(**KINDS["t5"])
    path = tmp_path / "tokenizer.model"
    choose = random.Random(5)
    for size in [0, 1, 2, len(whole) - 1, *(choose.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer.load(tmp_path)
    for _ in range(60):
        garbled = bytearray(whole)
        for _ in range(20):
            garbled[choose.randrange(8000)] = choose.randrange(256)
        path.write_bytes(garbled)
        try:
            Tokenizer.load(tmp_path)
        except UserError as error:
            assert str(path) in error.message and "\n" not in error.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "word", "vocab_size": 400}, "whole words"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "other marks for spaces"),
    ],
)
def test_models_that_no_tokenizer_json_can_follow_are_refused(changes, message, train, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(**changes))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["AlbertTokenizer", "XLMRobertaTokenizerFast", "XLNetTokenizer"])
def test_families_with_other_ids_are_refused_by_name(name, train, tmp_path):
    (tmp_path / "spiece.model").write_bytes(train(**KINDS["t5"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(UserError, match=f"model of {name.split('Tokenizer')[0].lower()} is not read"):
        Tokenizer.load(tmp_path)


def test_the_reader_agrees_with_the_package(train):
    model = train(**KINDS["llama with symbols"])
    ours, theirs = piece_model.parse(model), spm.SentencePieceProcessor(model_proto=model)
    assert len(ours.pieces) == theirs.get_piece_size()
    assert [piece.text for piece in ours.pieces] == [theirs.id_to_piece(i) for i in range(len(ours.pieces))]
    assert [piece.score for piece in ours.pieces] == [theirs.get_score(i) for i in range(len(ours.pieces))]
    assert [piece.kind == piece_model.Kind.CONTROL for piece in ours.pieces] == [
        theirs.is_control(i) for i in range(len(ours.pieces))
    ]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unknown_id()) == (
        theirs.bos_id(),
        theirs.eos_id(),
        theirs.pad_id(),
        theirs.unk_id(),
    )


def test_the_table_of_characters(train):
    table = piece_model.parse(train(**KINDS["t5"])).charsmap
    found = {
        text: charsmap.replacement(table, text) for text in ("½", "e\u0301", "\u1100\u1161\u11a8", "\t", "x", "好好")
    }
    assert found == {"½": "1⁄2", "e\u0301": "é", "\u1100\u1161\u11a8": "각", "\t": " ", "x": None, "好好": None}
    assert charsmap.composes(table)
