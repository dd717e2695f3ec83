"""`llmctl export-c`: what the compiled program says against what the checkpoint says, and what it does with bad files."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess

import pytest
import torch

transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402
from test_decoder_families import CONFIGS, FIRST, V, ids  # noqa: E402

from llmctl.errors import CalledWrongly, UserError  # noqa: E402
from llmctl.export.c import check, export  # noqa: E402
from llmctl.export.c.settings import ExportCSettings  # noqa: E402
from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Sampling  # noqa: E402
from llmctl.models.loading import load_model  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

COMPILER = check.compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
START = "Once upon a time"
# The program keeps its memory to the end, and says itself when there is no more.
os.environ.setdefault("ASAN_OPTIONS", "detect_leaks=0:allocator_may_return_null=1")


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """run.c, compiled as strictly as a compiler can, with sanitizers where they are installed."""
    path = tmp_path_factory.mktemp("program") / "run"
    command = [COMPILER, *STRICT, "-o", path, export.SOURCE, "-lm"]
    if subprocess.run([*command, *SANITIZERS], capture_output=True).returncode:
        subprocess.run([*command, "-O1"], check=True)
    return path


@pytest.fixture
def unchecked(monkeypatch):
    """As on a machine without a compiler: the tests compare by themselves, and compile once."""
    monkeypatch.setattr(check, "compiler", lambda: None)


def run(program, *arguments, code: int = 0, **kwargs) -> str:
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    result = subprocess.run([program, *map(str, arguments)], capture_output=True, **kwargs)
    assert "Sanitizer" not in result.stderr.decode() and "runtime error" not in result.stderr.decode(), result.stderr
    assert result.returncode == code, result.stderr
    return (result.stdout if code == 0 else result.stderr).decode(errors="surrogateescape")


def test_command_writes_what_generate_writes(llmctl, data, program, monkeypatch, tmp_path):
    model = data / "models" / "stories260K"
    result = llmctl("export-c", model, "-o", "f32", "--type", "f32")
    assert result.stdout == f"{tmp_path / 'f32'}\n" and "same first choice" in result.stderr
    monkeypatch.setattr(check, "_compile", lambda _, source, to: shutil.copy(program, to))  # of the same source
    int8 = export.export(model, tmp_path / "int8", ExportCSettings(type="int8"))
    assert int8.path == tmp_path / "int8" and "same first choice" in str(int8.checked.agreement)
    assert sorted(path.name for path in (tmp_path / "f32").iterdir()) == ["llmctl.json", "model.bin", "run.c"]
    session = Session.open(model, device="cpu")
    settings = [
        {"temperature": 0.0},
        {"seed": 5},
        {"seed": 2**64 - 1, "top_k": 20},
        {"seed": 9, "top_p": 0.9},
        {"seed": 3, "min_p": 0.1, "temperature": 1.2},
        {"seed": 4, "top_k": 30, "top_p": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.3},
        {"seed": 6, "frequency_penalty": 0.2, "top_p": 0.5},
    ]
    for each in settings:
        completion = session.begin(START, Sampling(max_new_tokens=60, **each))
        expected = "".join(session.stream(completion))
        flags = [word for name, value in each.items() for word in (f"--{name.replace('_', '-')}", value)]
        assert run(program, tmp_path / "f32" / "model.bin", START, "-n", 60, *flags) == f"{START}{expected}\n"
    words = run(program, tmp_path / "int8" / "model.bin", START, "-n", 40, "--temp", 0)
    assert words.startswith(f"{START}, there was a little girl named Lily.")
    from_pipe = run(program, tmp_path / "f32" / "model.bin", "-n", 3, "--temp", 0, stdin=None, input=b"Once\n")
    assert from_pipe.startswith("Once") and from_pipe.count("\n") == 1


SOME = [*FIRST, "llama-bias-tied", "llama-llama3", "qwen3_moe-mixed", "smollm3-windows", "phi3-longrope-partial"]


@pytest.mark.parametrize("name", SOME)
def test_families(name, program, unchecked, tmp_path):
    """Logits of every position; beyond the windows, and in batches of a prompt's tokens and in single ones."""
    reference = checks.reference(CONFIGS[name], tmp_path)
    export.export(reference.directory, tmp_path / "c", ExportCSettings())
    compiled = check._Program(program, tmp_path / "c" / "model.bin")
    length = export.model.context(reference.ours().config)
    text = ids(2, length)
    with torch.no_grad():
        error = (compiled.logits(text) - reference.model(text).logits).abs().max()
    assert error < 3e-4
    prompt = text[0, :3].tolist()
    expected = checks.our_greedy(reference.ours(), [prompt], length - 3, 1)[0]
    assert compiled.greedy(prompt, length - 3) == expected


def test_int8_is_near(program, unchecked, tmp_path):
    reference = checks.reference(CONFIGS["qwen3"], tmp_path, spread=0.05)
    export.export(reference.directory, tmp_path / "c", ExportCSettings(type="int8"))
    compiled = check._Program(program, tmp_path / "c" / "model.bin")
    text = ids(2, 30)
    with torch.no_grad():
        expected = reference.model(text).logits
    error = compiled.logits(text) - expected
    assert 0 < error.norm() < 0.03 * expected.norm()


@pytest.fixture(scope="module")
def tokenizers_by_name(data) -> dict:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, processors

    from llmctl.tokenization import byte_level, training

    words = ["the cat's 1234 hats\n\n\tdo  nothing;", "naïve Äpfel ÄRGER", "HTTPServer don't I'LL 42,000"] * 20
    found = {"ours": Tokenizer.train_bpe(words, 400), "bytes": Tokenizer.bytes()}
    plain = json.loads(found["ours"].json)
    for name, pattern in (("cl100k", byte_level.CL100K_PATTERN), ("o200k", byte_level.O200K_PATTERN)):
        plain["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        found[name] = Tokenizer(json.dumps(plain), training.CONFIG)
    plain = json.loads(found["ours"].json)
    plain["normalizer"] = {"type": "NFC"}
    plain["model"]["ignore_merges"] = True
    extra = {"single_word": False, "normalized": False, "special": True}
    plain["added_tokens"] += [
        {"id": 400, "content": "<|user|>", "lstrip": True, "rstrip": True, **extra},
        {"id": 401, "content": "<|user|>s", "lstrip": False, "rstrip": False, **extra},
        {"id": 402, "content": "é!", "lstrip": False, "rstrip": False, **extra, "normalized": True, "special": False},
    ]
    found["added-nfc"] = Tokenizer(json.dumps(plain), training.CONFIG)
    plain = json.loads(found["bytes"].json)
    digits = {"type": "Digits", "individual_digits": True}
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, gpt2]}
    found["digits"] = Tokenizer(json.dumps(plain), training.CONFIG)
    if (data / "tokenizers" / "gpt2").exists():
        found["gpt2"] = Tokenizer.load(data / "tokenizers" / "gpt2")
    stories = json.loads((data / "models" / "stories260K" / "tokenizer.json").read_text())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found["spm"] = Tokenizer(json.dumps(stories), config)
    for scheme in ("first", "always"):
        library = Library.from_str(json.dumps(stories))
        library.normalizer = None
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=scheme == "always")
        found[f"metaspace-{scheme}"] = Tokenizer(library.to_str(), config)
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("the", -4.5), ("cat", -3.5), ("s", -4.0)]
    pieces += [(letter, -6.0 - 0.01 * i) for i, letter in enumerate("abcdefghijklmnoprtuvwxyz.,")]
    library = Library(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    library.decoder = Library.from_str(json.dumps(stories)).decoder
    library.add_special_tokens(["</s>"])
    found["unigram"] = Tokenizer(library.to_str(), {"eos_token": "</s>", "unk_token": "<unk>"})
    return found


def some_prompts() -> list[str]:
    choose = random.Random(0)
    alphabet = [
        "a",
        "B",
        " ",
        "  ",
        "\n",
        "\r\n",
        "'s",
        "'LL",
        "7",
        "é",
        "e\u0301",
        "Ω",
        "東",
        "ǅ",
        "\u0300",
        "😀",
        "▁",
        "/",
    ]
    alphabet += [
        "the",
        "cat",
        ".",
        ",!",
        "\u00a0",
        "\u2003",
        "²",
        "٣",
        "가",
        "ㅎ",
        "<s>",
        "<|user|>",
        "<|endoftext|>",
        "<0x41>",
    ]
    mixed = ["".join(choose.choices(alphabet, k=choose.randint(1, 30))) for _ in range(40)]
    return [*check.TEXTS, " <|user|> s", "a <|user|>s b", "é!e\u0301!", "don'T she'll", " ", "x" * 300, *mixed]


@pytest.mark.parametrize(
    "name",
    [
        "ours",
        "bytes",
        "cl100k",
        "o200k",
        "added-nfc",
        "digits",
        "gpt2",
        "spm",
        "metaspace-first",
        "metaspace-always",
        "unigram",
    ],
)
def test_tokenizers(name, tokenizers_by_name, program, unchecked, tmp_path):
    tokenizer = tokenizers_by_name.get(name)
    if tokenizer is None:
        pytest.skip("no such tokenizer in the data")
    tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, **tiny)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    tokenizer = Tokenizer.load(tmp_path / "model")
    export.export(tmp_path / "model", tmp_path / "c", ExportCSettings())
    session = Session(load_model(tmp_path / "model"), tokenizer, Sampling(), _no_marks())
    for text in some_prompts():
        found = run(program, tmp_path / "c" / "model.bin", "--tokenize", "--", text)
        assert list(map(int, found.split())) == tokenizer.encode(text), text
    for seed in range(
        2 if tokenizer.vocab_size < 1000 else 0
    ):  # a model of random weights: pieces of characters, which the decoder has to mend
        completion = session.begin("the", Sampling(max_new_tokens=60, temperature=1.5, seed=seed))
        expected = "".join(session.stream(completion))
        flags = ("--ignore-eos", "-n", 60, "--temp", 1.5, "--seed", seed)
        assert run(program, tmp_path / "c" / "model.bin", "the", *flags) == f"the{expected}\n"


def _no_marks():
    from llmctl.generation.settings import NO_MARKS

    return NO_MARKS


@pytest.fixture(scope="module")
def small_file(data, tmp_path_factory):
    """model.bin of a small model with a tokenizer."""
    path = tmp_path_factory.mktemp("small")
    reference = checks.reference(CONFIGS["qwen3"], path)
    shutil.copy(data / "models" / "stories260K" / "tokenizer.json", reference.directory)
    config = json.loads((reference.directory / "config.json").read_text())
    assert config["vocab_size"] == V
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "compiler", lambda: None)
        export.export(reference.directory, path / "c", ExportCSettings(type="int8"))
    return path / "c" / "model.bin"


def test_broken_files_are_refused(small_file, program, tmp_path):
    """Cut short anywhere, longer, of another kind, and with any word changed: an error of one line, and no crash."""
    whole = small_file.read_bytes()
    broken = tmp_path / "broken.bin"
    choose = random.Random(0)
    for size in [0, 4, 8, 11, 12, *(choose.randrange(len(whole)) for _ in range(25)), len(whole) - 1]:
        broken.write_bytes(whole[:size])
        assert run(program, broken, "x", code=1).count("\n") == 1
    for content, word in (
        (whole + b"x", "goes on"),
        (b"#!/bin/sh" + whole, "not a model.bin"),
        (b"", "not a model.bin"),
    ):
        broken.write_bytes(content)
        assert word in run(program, broken, "x", code=1)
    broken.write_bytes(whole[:8] + struct.pack("<I", 7) + whole[12:])
    assert "version 7" in run(program, broken, "x", code=1)
    for _ in range(60):
        changed, place = bytearray(whole), choose.randrange(12, len(whole) - 4) // 4 * 4
        place = choose.randrange(12, 120) // 4 * 4 if choose.random() < 0.3 else place
        changed[place : place + 4] = struct.pack(
            "<I", choose.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, choose.getrandbits(32)])
        )
        broken.write_bytes(changed)
        result = subprocess.run([program, broken, "ab", "-n", "3"], capture_output=True)
        assert result.returncode in (0, 1) and b"Sanitizer" not in result.stderr, (place, result.stderr)


def test_misuse(small_file, program):
    assert "usage" in run(program, code=2)
    assert "usage" in run(program, "--help")
    for words, expected in (
        (["--frobnicate"], "no such option"),
        (["x", "y"], "one prompt"),
        (["x", "--top-p", "1.5"], "from 1e-09 to 1"),
        (["x", "-n", "-3"], "whole number"),
        (["x", "-n"], "needs a value"),
        (["x", "--seed", "18446744073709551616"], "whole number"),
    ):
        assert expected in run(program, small_file, *words, code=2)
    assert "cannot be opened" in run(program, "no-such-file", "x", code=1)
    assert "the model's context is 40" in run(program, small_file, "--ids", " ".join(["3"] * 41), code=1)
    assert "vocabulary ends at 96" in run(program, small_file, "--ids", "97", code=1)
    assert "not UTF-8: byte 0xff at offset 2" in run(
        program, small_file, b"ab\xff".decode(errors="surrogateescape"), code=1
    )


def test_refusals(llmctl, monkeypatch, tmp_path):
    cases = {
        "bert": (
            transformers.BertConfig(
                vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
            ),
            transformers.AutoModelForMaskedLM,
            "an encoder",
        ),
        "mamba": (
            transformers.MambaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, state_size=4),
            transformers.AutoModelForCausalLM,
            "layer 0 is Mamba",
        ),
    }
    for name, (config, auto, expected) in cases.items():
        auto.from_config(config).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} cannot be exported to C: .*{expected}"):
            export.export(tmp_path / name, tmp_path / "out", ExportCSettings())
    reference = checks.reference(CONFIGS["llama"], tmp_path)
    words = tmp_path / "theirs" / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    with pytest.raises(UserError, match="tokenizer cannot be exported to C: the decoder WordPiece"):
        export.export(reference.directory, tmp_path / "out", ExportCSettings())
    words.unlink()
    assert not (tmp_path / "out").exists()
    # int8 is never exact, so that no tolerance fails the check
    result = llmctl("export-c", reference.directory, "-o", "out", "--type", "int8", "--tolerance", "0", code=3)
    assert "KL divergence may be 0 at most" in result.stderr and not (tmp_path / "out").exists()
    monkeypatch.setattr(check, "compiler", lambda: None)
    assert export.export(reference.directory, tmp_path / "out", ExportCSettings()).checked.compiler is None
    with pytest.raises(CalledWrongly, match="exists already"):
        export.export(reference.directory, tmp_path / "out", ExportCSettings())
    with pytest.raises(CalledWrongly, match="would replace .*, which is read"):
        export.export(reference.directory, reference.directory, ExportCSettings(overwrite=True))
