"""Turns of a conversation from lines: a JSON message where a line begins with a brace, else the text of a question."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from llmctl.errors import UserError
from llmctl.finetune.data.messages import from_openai

Item = TypeVar("Item")


@dataclass(frozen=True)
class Turn:
    """`name` says where it stands, for messages."""

    message: dict[str, Any]
    is_json: bool
    name: str

    @property
    def role(self) -> str:
        return self.message["role"]

    @property
    def content(self) -> str:
        return self.message["content"]

    def named(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; what goes wrong while they come names this turn."""
        with _named(self.name):
            yield from items


def read_turns(lines: Iterable[bytes]) -> Iterator[Turn]:
    """Blank lines are skipped. Raises `UserError` for what is no UTF-8, no JSON or no message, and where there is nothing."""
    is_empty = True
    for number, line in enumerate(lines, 1):
        name, line = f"standard input: line {number}", line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: not UTF-8: byte {line[error.start]:#04x} at offset {error.start}") from error
        if not text.strip():
            continue
        is_empty = False
        if text.lstrip().startswith("{"):
            yield Turn(_message(text, name), True, name)
        else:
            yield Turn({"role": "user", "content": text}, False, name)
    if is_empty:
        raise UserError("standard input is empty; expected a question or a JSON message in each line")


def _message(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{name}: not valid JSON ({error})", hint='a message is {"role": "user", "content": "…"}'
        ) from error
    with _named(name):
        return from_openai([value], "message")[0]


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.hint) from error
