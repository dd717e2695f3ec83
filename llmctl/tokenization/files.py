"""Find and read the tokenizer of a file or a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path

from llmctl.errors import UserError
from llmctl.tokenization import special, training

# Formats that are known by name but not read.
FOREIGN = {
    "tokenizer.model": "a SentencePiece model",
    "spiece.model": "a SentencePiece model",
    "vocab.txt": "a WordPiece vocabulary",
    "tekken.json": "a Tekken vocabulary",
}
READABLE = "a tokenizer.json, or a directory with tokenizer.json or with GPT-2's vocab.json and merges.txt"


def read(path: Path) -> tuple[str, dict]:
    """The text of tokenizer.json and the configuration beside it, special tokens gathered from every file that names them."""
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer", hint=f"give {READABLE}, or the word bytes")
    if path.is_dir():
        return _read_directory(path)
    _refuse_foreign(path)
    return _read_text(path), _read_config(path.parent, path)


def _read_directory(directory: Path) -> tuple[str, dict]:
    if (directory / "tokenizer.json").exists():
        return _read_text(directory / "tokenizer.json"), _read_config(directory, directory / "tokenizer.json")
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        return _read_gpt2(directory)
    for file in sorted(directory.iterdir()):
        _refuse_foreign(file)
    raise UserError(f"{directory}: holds no tokenizer", hint=f"expected {READABLE}")


def _refuse_foreign(file: Path) -> None:
    kind = FOREIGN.get(file.name) or ("a table of tiktoken ranks" if file.suffix == ".tiktoken" else None)
    if kind:
        raise UserError(f"{file}: {kind} is not read", hint=f"expected {READABLE}")


def _read_text(path: Path) -> str:
    try:
        # Not read_text: it would turn \r\n into \n, and with it change the file's sha256.
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}", hint=f"expected {READABLE}") from error


def _read_json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_config(directory: Path, tokenizer_json: Path) -> dict:
    """tokenizer_config.json, completed from special_tokens_map.json, generation_config.json, config.json and the template file."""
    config = _read_json(directory / "tokenizer_config.json")
    for name, token in _read_json(directory / "special_tokens_map.json").items():
        if config.get(name) is None:
            config[name] = token
    template = directory / "chat_template.jinja"
    if config.get("chat_template") is None and template.exists():
        config["chat_template"] = _read_text(template)
    for source in ("generation_config.json", "config.json"):
        _name_by_id(config, _read_json(directory / source), tokenizer_json)
    return config


def _name_by_id(config: dict, source: dict, tokenizer_json: Path) -> None:
    """Name bos, eos and pad tokens that only their ids are known of; of a list of ids the first counts."""
    missing = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = source.get(f"{name}_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if special.content(config.get(name)) is None and isinstance(token_id, int):
            missing[token_id] = [*missing.get(token_id, []), name]
    if not missing:
        return
    spec = _read_json(tokenizer_json)
    tokens = {token["id"]: token["content"] for token in spec.get("added_tokens", [])}
    for token_id, names in missing.items():
        if token_id in tokens:
            config.update(dict.fromkeys(names, tokens[token_id]))


def _read_gpt2(directory: Path) -> tuple[str, dict]:
    vocab = _read_json(directory / "vocab.json")
    config = _read_json(directory / "tokenizer_config.json")
    kind = config.get("tokenizer_class", "GPT2Tokenizer")
    if not kind.startswith("GPT2Tokenizer") or training.END_OF_TEXT not in vocab:
        raise UserError(
            f"{directory}: vocab.json and merges.txt of a {kind} without {training.END_OF_TEXT} are not read",
            hint=f"expected {READABLE}",
        )
    lines = _read_text(directory / "merges.txt").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise UserError(f"{directory / 'merges.txt'}: a line is not two tokens")
    return training.gpt2_json(vocab, merges), {**training.CONFIG, **config}
