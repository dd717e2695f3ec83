"""Texts that are worked on one by one: a line each, plain or a JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.data.inputs import damage_named, decompressed, find_inputs
from llmctl.errors import UserError
from llmctl.stream_source import SequentialSource

_BLOCK = 1 << 16


@dataclass(frozen=True)
class TextRow:
    """`rest` are the other keys of a JSON object; `name` says where the text stands, for messages."""

    text: str
    name: str
    rest: dict[str, Any]


def read_rows(paths: Sequence[str], field: str = "text") -> Iterator[TextRow]:
    """The lines of files, which may be gzip or zstd; "-" is standard input.

    A file whose first line is a JSON object that has `field` is JSON Lines, and blank lines in it are skipped; any other
    has one text in each line. Raises UserError for what cannot be read, naming file and line.
    """
    for each in find_inputs(list(paths)):
        is_json = None
        with each.open() as file, damage_named(each.name):
            for number, line in enumerate(_lines(decompressed(SequentialSource(file))), start=1):
                name = f"{each.name}: line {number}"
                text = _decoded(line, name)
                if is_json is None:
                    is_json = _has_field(text, field)
                if not is_json:
                    yield TextRow(text, name, {})
                elif text.strip():
                    yield _parsed(text, field, name)


def _lines(source: SequentialSource) -> Iterator[bytes]:
    """Without the end of line."""
    rest = b""
    while block := source.read(_BLOCK):
        *whole, rest = (rest + block).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in whole)
    if rest:
        yield rest


def _decoded(line: bytes, name: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8: byte {line[error.start]:#04x} at offset {error.start}") from error


def _has_field(text: str, field: str) -> bool:
    try:
        content = json.loads(text)
    except ValueError:
        return False
    return isinstance(content, dict) and field in content


def _parsed(text: str, field: str, name: str) -> TextRow:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get(field), str):
        raise UserError(f"{name}: expected an object with a text under {field!r}")
    return TextRow(content.pop(field), name, content)
