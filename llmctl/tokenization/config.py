"""What the files beside a vocabulary say of a tokenizer: its class, special tokens, added tokens, chat templates."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llmctl.errors import UserError
from llmctl.tokenization import special

# Classes that say nothing of the family.
_GENERIC = ("", "pretrained", "tokenizersbackend", "pythonbackend", "sentencepiecebackend")


def read_text(path: Path) -> str:
    try:
        # Not read_text: it would turn \r\n into \n, and with it change the file's sha256.
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> dict:
    """The object of a JSON file, an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value


def read(directory: Path) -> dict:
    """tokenizer_config.json, completed from special_tokens_map.json and the files of templates."""
    config = read_json(directory / "tokenizer_config.json")
    for name, token in read_json(directory / "special_tokens_map.json").items():
        if config.get(name) is None:
            config[name] = token
    templates = _templates(directory)
    if templates:
        config["chat_template"] = templates
    return config


def _templates(directory: Path) -> str | list[dict] | None:
    """The template of chat_template.jinja, and those of additional_chat_templates/ by their files' names."""
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    default = directory / "chat_template.jinja"
    if not files:
        return read_text(default) if default.exists() else None
    if default.exists():
        files = {"default": default, **files}
    return [{"name": name, "template": read_text(path)} for name, path in files.items()]


def family(directory: Path, config: dict) -> str:
    """The family in small letters and digits ("xlmroberta"), by the tokenizer's class or the model's type; else ""."""
    name = re.sub(r"Tokenizer(Fast)?$", "", str(config.get("tokenizer_class") or "")).lower()
    if name in _GENERIC:
        name = str(read_json(directory / "config.json").get("model_type") or "").lower()
    return re.sub(r"[^a-z0-9]", "", name)


def named_by_id(config: dict, directory: Path, tokenizer_json: str) -> dict:
    """Names bos, eos and pad tokens that generation_config.json or config.json know the ids of; the first of a list counts."""
    missing: dict[str, int] = {}
    for source in ("generation_config.json", "config.json"):
        ids = read_json(directory / source)
        for role in ("bos_token", "eos_token", "pad_token"):
            token_id = ids.get(f"{role}_id")
            token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
            if special.content(config.get(role)) is None and isinstance(token_id, int):
                missing.setdefault(role, token_id)
    if not missing:
        return config
    tokens = {token["id"]: token["content"] for token in _added_tokens(tokenizer_json)}
    return config | {role: tokens[token_id] for role, token_id in missing.items() if token_id in tokens}


def _added_tokens(tokenizer_json: str) -> list[dict]:
    try:
        return json.loads(tokenizer_json).get("added_tokens") or []
    except (json.JSONDecodeError, AttributeError):
        return []  # whoever makes a tokenizer of it says what is wrong
