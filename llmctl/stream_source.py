"""Where the bytes of a token stream come from: a mapped file, or a pipe that is read in order."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

from llmctl.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Every Arrow IPC stream starts with this marker; checking it keeps foreign bytes from being taken for a length.
MARKER = b"\xff\xff\xff\xff"
_END = MARKER + bytes(4)
_PIECE = 1 << 24


def truncated(name: str, detail: str) -> UserError:
    return UserError(
        f"{name}: truncated stream: {detail}",
        hint="the `llmctl tokenize` that wrote it did not finish; run it again",
    )


def not_a_stream(name: str, detail: str) -> UserError:
    return UserError(
        f"{name}: not a llmctl token stream: {detail}", hint="make one from text: llmctl tokenize FILE -o OUT.arrow"
    )


class SequentialSource:
    """A pipe as Arrow wants it: reads are whole and bounded, and copied to `copy_to` where that is given."""

    def __init__(self, source: BinaryIO, copy_to: BinaryIO | None = None):
        name = getattr(source, "name", None)
        self.name = name if isinstance(name, str) and name != "<stdin>" else "standard input"
        self.closed = False
        self._source, self._copy_to = source, copy_to
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        head = self.read(size)
        self._ahead = head + self._ahead
        return head

    def read(self, size: int) -> bytes:
        parts, self._ahead = [self._ahead[:size]] if self._ahead else [], self._ahead[size:]
        missing = size - sum(map(len, parts))
        # In pieces, so that a damaged length ends as a short read and not as an allocation of that length.
        while missing > 0 and (part := self._source.read(min(missing, _PIECE))):
            if self._copy_to is not None:
                self._copy(part)
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self.closed = True

    def _copy(self, part: bytes) -> None:
        try:
            self._copy_to.write(part)
        except OSError as error:  # not to be taken for a failure of the source
            place = os.path.dirname(self._copy_to.name)
            raise UserError(f"{self.name}: cannot be copied to {place}: {error.strerror.lower()}") from error


def open_mapped(path: str | os.PathLike) -> pa.MemoryMappedFile:
    import pyarrow as pa

    try:
        # An empty file cannot be mapped.
        if os.path.getsize(path) == 0:
            raise truncated(os.fspath(path), "it is empty")
        return pa.memory_map(os.fspath(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def open_reader(source: SequentialSource | pa.MemoryMappedFile, name: str) -> pa.ipc.RecordBatchStreamReader:
    """Read the schema; raises `UserError` for bytes that are no Arrow stream."""
    import pyarrow as pa

    if isinstance(source, SequentialSource):
        head = source.peek(len(MARKER))
    else:
        head = source.read(len(MARKER))
        source.seek(0)
    if not head:
        raise truncated(name, "it is empty")
    if not MARKER.startswith(head):
        raise not_a_stream(name, f"it starts with {head!r}")
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid as error:
        raise truncated(name, str(error)) from error


def expect_end(source: SequentialSource | pa.MemoryMappedFile, name: str) -> None:
    """Read past Arrow's end marker; anything after it would be lost silently."""
    if not _END.startswith(source.read(len(_END) + 1)):
        raise UserError(
            f"{name}: bytes follow the end of the token stream",
            hint="streams do not join with `cat`; give the files as arguments instead",
        )
