"""Text files of one directory, to be read and not written."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llmctl.errors import UserError

_MAX_LINES = 2000
_MAX_LINE = 2000
_MAX_NAMES = 500
_BLOCK = 4 * _MAX_LINE  # bytes: a character has four at most


class Directory:
    """Paths are relative to it; none leads out, by dots or by links."""

    def __init__(self, path: str | os.PathLike):
        self.top = Path(path).resolve()
        if not self.top.is_dir():
            raise UserError(f"{path}: no directory whose files a tool could read")

    def list(self, path: str = ".") -> str:
        """Names of a directory, one in each line, directories with a slash."""
        place = self._inside(path)
        if not place.is_dir():
            raise UserError(f"{path}: no such directory")
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(place))
        rest = len(names) - _MAX_NAMES
        return "\n".join(names[:_MAX_NAMES] + [f"[{rest} more]"] * (rest > 0)) or "[empty]"

    def read(self, path: str, first_line: int = 1, lines: int = 200) -> str:
        """Numbered lines of a text file."""
        place = self._inside(path)
        if not place.is_file():  # a pipe or a device would never end
            raise UserError(f"{path}: no such file")
        first, count = max(1, int(first_line)), min(max(1, int(lines)), _MAX_LINES)
        with open(place, "rb") as file:
            if b"\0" in file.read(4096):
                raise UserError(f"{path}: not a text file")
            file.seek(0)
            found = list(itertools.islice(_lines(file), first - 1, first - 1 + count))
        if not found:
            raise UserError(f"{path}: there is no line {first}")
        texts = (line.decode(errors="replace").rstrip("\r\n")[:_MAX_LINE] for line in found)
        return "\n".join(f"{number}: {text}" for number, text in enumerate(texts, first))

    def _inside(self, path: str) -> Path:
        place = (self.top / str(path)).resolve()
        if place != self.top and self.top not in place.parents:
            raise UserError(f"{path}: outside of the directory that may be read")
        return place


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The beginning of each line, whose rest is read over: one line may be larger than memory."""
    while line := file.readline(_BLOCK):
        yield line
        while not line.endswith(b"\n") and (line := file.readline(_BLOCK)):
            pass
