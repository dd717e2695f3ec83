"""The items of a JSON array one after the other, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from llmctl.errors import UserError
from llmctl.stream_source import SequentialSource

BLOCK = 1 << 18
_BLANK = re.compile(r"[ \t\r\n]*")
# A number, a word or an escape that the end of the text cuts in two is reported where it began.
_LONGEST_CUT = 16
_decode = json.JSONDecoder().raw_decode


def array_items(content: SequentialSource, name: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each item. Raises `UserError` with file and line for what is no JSON, which ends the array."""
    text = _Text(content, name)
    text.take("[")
    while text.next() != "]":
        yield text.line, text.value()
        if text.next() == ",":
            text.take(",")
        elif text.next() != "]":
            raise text.error("expected a comma or the end of the array")
    text.take("]")
    if text.next():
        raise text.error("something follows the array")


class _Text:
    """A window on the text that moves forward only."""

    def __init__(self, content: SequentialSource, name: str):
        self._content, self._name = content, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._at, self._ended = "", 0, False
        self.line = 1

    def next(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        while True:
            self._move(_BLANK.match(self._held, self._at).end())
            if self._at < len(self._held) or self._ended:
                return self._held[self._at : self._at + 1]
            self._read()

    def take(self, mark: str) -> None:
        if self.next() != mark:
            raise self.error(f"expected {mark!r}")
        self._move(self._at + 1)

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = _decode(self._held, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._is_cut(error):
                    raise self.error(f"not JSON: {error.msg}", error.pos) from error
                self._read()
                continue
            # a number at the end of the window may go on
            if end < len(self._held) or self._ended:
                self._move(end)
                return value
            self._read()

    def error(self, message: str, place: int | None = None) -> UserError:
        line = self.line + self._held.count("\n", self._at, place or self._at)
        what = message if self._at < len(self._held) else "the array does not end"
        return UserError(f"{self._name}:{line}: {what}")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._held) - _LONGEST_CUT

    def _move(self, place: int) -> None:
        self.line += self._held.count("\n", self._at, place)
        self._at = place

    def _read(self) -> None:
        # as much again as is held, so that a long item is not parsed once for each block of it
        block = self._content.read(max(BLOCK, len(self._held) - self._at))
        self._ended = not block
        try:
            self._held = self._held[self._at :] + self._decoder.decode(block, self._ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._name}: not UTF-8 behind line {self.line}: {error.reason}") from error
        self._at = 0
