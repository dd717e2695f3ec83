"""Find and read the tokenizer of a file or a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

from llmctl.errors import UserError
from llmctl.tokenization import byte_pairs, ranks, sentencepiece, wordpiece
from llmctl.tokenization import config as configuration

READABLE = "tokenizer.json, vocab.json with merges.txt, tokenizer.model, spiece.model, vocab.txt or a .tiktoken file"
# What a directory is searched for, the first that is there.
_NAMES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "*.tiktoken", "*.model", "vocab.txt")
# Formats that are known by name but not read.
_FOREIGN = {"tekken.json": "a Tekken vocabulary", "vocab.bpe": "GPT-2's first form of merges", "bpe.codes": "fastBPE"}


def read(path: Path) -> tuple[str, dict]:
    """The text of tokenizer.json, made from other files where there is none, and its configuration.

    Raises UserError naming the file that is missing, broken, or of a format that is not read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer", hint=f"give {READABLE}, a directory with one, or the word bytes")
    file = _in_directory(path) if path.is_dir() else path
    if file.suffix == ".gguf":
        return _read_gguf(file)
    if file.name in _FOREIGN:
        raise UserError(f"{file}: {_FOREIGN[file.name]} is not read", hint=f"expected {READABLE}")
    try:
        config = configuration.read(file.parent)
        json_text, config = _read(file, config)
        return json_text, configuration.named_by_id(config, file.parent, json_text)
    except UserError as error:
        raise UserError(f"{file}: {error.message}", hint=error.hint) from error


def _read_gguf(file: Path) -> tuple[str, dict]:
    from llmctl.gguf import file as gguf_file
    from llmctl.gguf import vocabulary

    try:
        return vocabulary.tokenizer_json(gguf_file.opened(file).fields)
    except UserError as error:
        raise UserError(f"{file}: {error.message}", hint=error.hint) from error


def has_tokenizer(directory: Path) -> bool:
    """Of a checkpoint's directory; a GGUF file has its tokenizer inside."""
    return directory.suffix == ".gguf" or any(any(directory.glob(name)) for name in _NAMES)


def _in_directory(directory: Path) -> Path:
    for name in (*_NAMES, *_FOREIGN):
        found = sorted(directory.glob(name))
        if found:
            return found[0]
    if (directory / "merges.txt").exists():
        raise UserError(f"{directory}: merges.txt without the vocab.json that belongs to it")
    raise UserError(f"{directory}: holds no tokenizer", hint=f"expected {READABLE}")


def _read(file: Path, config: dict) -> tuple[str, dict]:
    if file.name in ("vocab.json", "merges.txt"):
        return _read_byte_pairs(file.parent, config)
    if file.suffix in (".model", ".tiktoken", ".spm"):
        return _read_binary(file, *_family_and_config(file, config))
    if file.suffix == ".txt":
        family, config = _family_and_config(file, config)
        return wordpiece.convert(configuration.read_text(file), config, family)
    return configuration.read_text(file), config


def _read_byte_pairs(directory: Path, config: dict) -> tuple[str, dict]:
    for name in ("vocab.json", "merges.txt"):
        if not (directory / name).exists():
            raise UserError(f"no {name} beside it", hint="a byte-level BPE is the two files vocab.json and merges.txt")
    vocab = configuration.read_json(directory / "vocab.json")
    merges = configuration.read_text(directory / "merges.txt")
    family, config = _family_and_config(directory / "vocab.json", config)
    return byte_pairs.convert(vocab, merges, config, family)


def _read_binary(file: Path, family: str, config: dict) -> tuple[str, dict]:
    data = file.read_bytes()
    # Llama 3 calls its ranks tokenizer.model too.
    if file.suffix == ".tiktoken" or ranks.looks_like(data):
        return ranks.convert(data, file.stem, config, family)
    return sentencepiece.convert(data, config, family)


def _family_and_config(file: Path, config: dict) -> tuple[str, dict]:
    """The family, and the configuration with the content of added_tokens.json in `added_tokens`."""
    added = configuration.read_json(file.parent / "added_tokens.json")
    return configuration.family(file.parent, config), config | {"added_tokens": added}
