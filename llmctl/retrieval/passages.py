"""Files to passages: a few neighbouring lines each, with the file and the lines that they stand in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PASSAGE_CHARACTERS = 1200
MAX_FILE_BYTES = 16 << 20
_SKIPPED = {"node_modules", "__pycache__"}


@dataclass(frozen=True)
class Passage:
    """Lines `first` to `last` (from 1) of a file, whose path is relative to the directory that was indexed."""

    path: str
    first: int
    last: int
    text: str
    score: float = 0.0

    @property
    def source(self) -> str:
        return f"{self.path}:{self.first}" if self.first == self.last else f"{self.path}:{self.first}-{self.last}"


def text_files(directory: Path) -> Iterator[Path]:
    """Regular files below a directory in order of their names; hidden ones are left out, and links are not followed."""
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in _SKIPPED)
        for name in sorted(names):
            path = Path(folder, name)
            if name[0] != "." and path.is_file() and not path.is_symlink():
                yield path


def read_text(path: Path) -> str | None:
    """None for what is no text in UTF-8, cannot be read, or is too large to be one that a person wrote."""
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b"\0"
    except OSError:  # gone meanwhile, or not ours to read
        return None
    try:
        return None if b"\0" in content else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def split(path: str, text: str, characters: int = PASSAGE_CHARACTERS) -> list[Passage]:
    """Whole lines, up to so many characters, ending where a blank line or a heading allows it; a longer line alone."""
    passages: list[Passage] = []
    lines: list[str] = []
    first, size = 1, 0

    def close(last: int) -> None:
        nonlocal lines, size
        body = "\n".join(lines).strip("\n")
        if body.strip():
            blank = next(i for i, line in enumerate(lines) if line.strip())
            passages.append(Passage(path, first + blank, last, body))
        lines, size = [], 0

    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):  # as editors count
        line = line.removesuffix("\r")
        is_break = not line.strip() or line.startswith("#")
        if lines and (size + len(line) > characters or (is_break and size > characters // 2)):
            close(number - 1)
        if not lines:
            first = number
        lines.append(line)
        size += len(line) + 1
    close(first + len(lines) - 1)
    return passages
