"""The bytes of a corpus: files, pipes and standard input, decompressed on the way."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from llmctl.errors import UserError
from llmctl.stream_source import SequentialSource

# Recognized by content: a file that was decompressed on its way here may have kept its name.
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_COPY = 1 << 20


class CountedFile(io.FileIO):
    """An unbuffered file that counts what is read: a thread that waits in it at exit holds no lock of a buffer."""

    n_read = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.n_read += len(data)
        return data


@dataclass
class Input:
    """One source of bytes; `size` in bytes on disk is None for a pipe, which can be read once only."""

    name: str
    path: str
    size: int | None
    start: int = 0
    _spooled: BinaryIO | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def open(self) -> Iterator[CountedFile]:
        """The raw bytes from the beginning."""
        descriptor = 0 if self.path == "-" else None
        if self._spooled is not None:
            descriptor = self._spooled.fileno()
        with CountedFile(self.path if descriptor is None else descriptor, closefd=descriptor is None) as file:
            if self.size is not None:
                file.seek(self.start)
            yield file

    def spool(self) -> None:
        """Copy a pipe to a nameless temporary file, so that it can be read several times."""
        if self.size is not None:
            return
        copy = tempfile.TemporaryFile(prefix="llmctl-")
        with self.open() as source:
            try:
                shutil.copyfileobj(source, copy, _COPY)
                copy.flush()
            except OSError as error:
                raise UserError(
                    f"{self.name}: cannot be copied to {tempfile.gettempdir()}: {error.strerror}",
                    hint="TMPDIR names a directory with more room",
                ) from error
        self.size = copy.tell()
        self._spooled = copy


def find_inputs(paths: list[str]) -> list[Input]:
    """Inputs for paths, where "-" is standard input. Raises `UserError` for one that is not there or is no file."""
    return [_find(path) for path in paths]


def _find(path: str) -> Input:
    name = "standard input" if path == "-" else path
    try:
        status = os.fstat(0) if path == "-" else os.stat(path)
    except OSError as error:
        raise UserError(f"{name}: {(error.strerror or str(error)).lower()}") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{name}: is a directory", hint=f"name its files: {os.path.join(path, '*')}")
    if not stat.S_ISREG(status.st_mode):
        return Input(name, path, None)
    start = os.lseek(0, 0, os.SEEK_CUR) if path == "-" else 0
    return Input(name, path, max(status.st_size - start, 0), start)


def decompressed(source: SequentialSource) -> SequentialSource:
    """`source` itself, or what its gzip or zstd members hold."""
    head = source.peek(max(map(len, _CODECS)))
    codec = next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)
    if codec is None:
        return source
    import pyarrow as pa

    return SequentialSource(pa.CompressedInputStream(pa.PythonFile(source, mode="r"), codec))


@contextlib.contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Turn what the codecs raise for damaged data into an error that names the input."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(
            f"{name}: {str(error)[:1].lower()}{str(error)[1:]}", hint="copy or download it again"
        ) from error


@contextlib.contextmanager
def temporary_copy(source: SequentialSource) -> Iterator[BinaryIO]:
    """What is left of `source`, in a nameless file that can seek."""
    with tempfile.TemporaryFile(prefix="llmctl-") as copy:
        shutil.copyfileobj(source, copy, _COPY)
        copy.seek(0)
        yield copy
