"""Tokenizers of every kind that can be loaded or trained: ids, text, streams of text, files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import UserError
from llmctl.tokenization import training
from llmctl.tokenizer import Tokenizer

TEXT = "Once upon a time,  there's a dog (née Λάϊκα) who can't count: 1234 🦙🦙!\n\n\tdef f(x):\n        return x\n"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train_bpe([TEXT * 3, "", TEXT.upper()], 400)


@pytest.fixture(scope="module")
def gpt2(data) -> Tokenizer:
    return Tokenizer.load(data / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def stories(data) -> Tokenizer:
    return Tokenizer.load(data / "models" / "stories260K")


@pytest.fixture(scope="module")
def kinds(trained, gpt2, stories) -> dict[str, Tokenizer]:
    return {"trained": trained, "bytes": Tokenizer.bytes(), "gpt2": gpt2, "stories": stories}


KINDS = pytest.mark.parametrize("kind", ["trained", "bytes", "gpt2", "stories"])


@KINDS
def test_text_comes_back(kind, kinds):
    tokenizer = kinds[kind]
    for text in (TEXT, "", " ", "\n", "\x00", "  two spaces first"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@KINDS
def test_documents_are_encoded_for_training(kind, kinds):
    tokenizer = kinds[kind]
    front = [tokenizer.bos_id] if tokenizer.adds_bos else []
    texts = [TEXT, "", "x"]
    ids, offsets = tokenizer.encode_documents(texts)
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == 4
    for i, text in enumerate(texts):
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert ids[offsets[i] : offsets[i + 1]].tolist() == [*front, *plain, tokenizer.eos_id]


@KINDS
def test_special_tokens_in_a_corpus_are_text(kind, kinds):
    tokenizer = kinds[kind]
    marker = tokenizer.config["eos_token"]
    assert tokenizer.encode(f"a{marker}b", add_special_tokens=False).count(tokenizer.eos_id) == 1
    ids, _ = tokenizer.encode_documents([f"a{marker}b"])
    assert ids.tolist().count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == f"a{marker}b"


@KINDS
def test_reference_kernels_give_the_same_ids(kind, kinds, monkeypatch):
    monkeypatch.setenv("LLMCTL_KERNELS", "reference")
    again = Tokenizer.from_json(kinds[kind].json, kinds[kind].config)
    ids, offsets = again.encode_documents([TEXT, ""])
    expected_ids, expected_offsets = kinds[kind].encode_documents([TEXT, ""])
    assert ids.tolist() == expected_ids.tolist() and offsets.tolist() == expected_offsets.tolist()


@KINDS
def test_a_lone_surrogate_is_refused(kind, kinds):
    with pytest.raises(UserError, match="document 1 holds a lone surrogate at character 2"):
        kinds[kind].encode_documents(["fine", "ab\ud800"])


@KINDS
def test_a_stream_is_the_whole_text(kind, kinds):
    tokenizer = kinds[kind]

    @settings(max_examples=100, deadline=None)
    @given(text=ANY_TEXT, extra=ANY_TEXT)
    def check(text, extra):
        ids = tokenizer.encode(text)
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, ids)) == text == tokenizer.decode(ids)
        assert decoder.flush() == ""
        # A continuation keeps the space in front of its first word.
        both = [*ids, *tokenizer.encode(extra, add_special_tokens=False)]
        decoder = tokenizer.stream_decoder(after=ids)
        assert text + "".join(map(decoder.push, both[len(ids) :])) == tokenizer.decode(both)

    check()


@pytest.mark.parametrize("kind", ["trained", "bytes", "gpt2"])
def test_a_stream_of_any_ids_is_what_decode_gives(kind, kinds):
    tokenizer = kinds[kind]

    @settings(max_examples=200, deadline=None)
    @given(ids=st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30), skip=st.booleans())
    def check(ids, skip):
        decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@KINDS
def test_half_a_character_is_held_back(kind, kinds):
    tokenizer = kinds[kind]
    ids = tokenizer.encode("\U000f1234", add_special_tokens=False)
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids[:-1])).strip() == ""
    assert decoder.flush() == "\ufffd"


@KINDS
def test_bytes_of_tokens_are_the_bytes_of_the_text(kind, kinds):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip(" ") == TEXT
    assert tokenizer.token_bytes(tokenizer.eos_id).decode() == tokenizer.config["eos_token"]
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""


@KINDS
def test_saved_files_open_in_transformers_and_here(kind, kinds, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = kinds[kind]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "", f"a{tokenizer.config['eos_token']}b"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert theirs.decode(tokenizer.encode(TEXT), skip_special_tokens=True) == TEXT
    assert len(theirs) == tokenizer.vocab_size
    ours = Tokenizer.load(tmp_path)
    assert (ours.json, ours.config, ours.sha256) == (tokenizer.json, tokenizer.config, tokenizer.sha256)


def test_facts(trained, gpt2, stories):
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id, gpt2.pad_id, gpt2.adds_bos) == (50257, 50256, 50256, None, False)
    assert (stories.vocab_size, stories.bos_id, stories.eos_id, stories.adds_bos) == (512, 1, 2, True)
    assert trained.bos_id == trained.eos_id and not trained.adds_bos and 300 < trained.vocab_size <= 400
    assert trained.sha256 == hashlib.sha256(trained.json.encode()).hexdigest()


def test_added_tokens_count():
    spec = json.loads(training.plain_bytes())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 257, "content": "<pad>"})
    tokenizer = Tokenizer(json.dumps(spec), {"eos_token": "<|endoftext|>", "pad_token": {"content": "<pad>"}})
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (258, 257)


def test_a_saved_length_limit_cuts_nothing(trained):
    spec = json.loads(trained.json)
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    limited = Tokenizer(json.dumps(spec), trained.config)
    assert limited.encode(TEXT) == trained.encode(TEXT)
    assert limited.encode_documents([TEXT])[0].tolist() == trained.encode_documents([TEXT])[0].tolist()


def test_training_is_the_same_everywhere():
    program = (
        "import sys; from llmctl.tokenizer import Tokenizer;"
        "print(Tokenizer.train_bpe((line for line in sys.stdin.read().split('|')), 350).sha256)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            input="|".join([TEXT] * 5),
            env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("0", "1"), ("1", "3"))
    ]
    assert runs[0] == runs[1]


def test_training_cuts_long_texts_without_a_trace(monkeypatch):
    whole = training.byte_level_bpe([TEXT * 40], 500)
    monkeypatch.setattr(training, "PIECE", 50)
    assert training.byte_level_bpe([TEXT * 40], 500) == whole


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["ab" * 3]])
def test_training_on_almost_nothing(texts):
    tokenizer = Tokenizer.train_bpe(texts, 300)
    assert 257 <= tokenizer.vocab_size <= 300
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="a vocabulary of 256 is too small"):
        Tokenizer.train_bpe(["a"], 256)


def test_load_gathers_what_other_files_say(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.json)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|endoftext|>"}}')
    eos = trained.eos_id
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 5], "pad_token_id": eos}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.load(path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (eos, eos, eos)
        assert tokenizer.chat_template == "{{ messages }}" and tokenizer.config["model_max_length"] == 64


def test_a_bare_file_has_the_usual_end_of_text(trained, tmp_path, caplog):
    (tmp_path / "tokenizer.json").write_text(trained.json)
    with caplog.at_level("INFO", logger="llmctl"):
        assert Tokenizer.load(tmp_path / "tokenizer.json").eos_id == trained.eos_id
    assert "<|endoftext|>" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"\n\x0b", "not a SentencePiece model"),
        ("tokenizer.model", b"", "it lacks the pieces"),
        ("vocab.txt", b"[PAD]\n", "no token \\[UNK\\] for unknown words"),
        ("vocab.txt", b"[UNK]\n\n[CLS]\n", "line 2 holds no token"),
        ("cl100k_base.tiktoken", b"IQ== 0\n", "the byte 0x00 has no rank"),
        ("cl100k_base.tiktoken", b"IQ== 0\nIQ=\n", "line 2: expected a token in base64 and its rank"),
        ("vocab.json", b"{}", "no merges.txt beside it"),
        ("merges.txt", b"a b\n", "merges.txt without the vocab.json"),
        ("tekken.json", b"{}", "a Tekken vocabulary is not read"),
        ("notes.md", b"", "holds no tokenizer"),
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8 at byte 0"),
    ],
)
def test_other_files_are_refused_by_name(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_a_missing_path_and_a_broken_configuration(trained, tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text(trained.json)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        Tokenizer.load(tmp_path)
