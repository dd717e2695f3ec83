"""One safetensors file: written tensor by tensor, checked against its size when opened, mapped and never read whole.

The format is https://huggingface.co/docs/safetensors: 8 bytes with the header's length, a JSON header, the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.errors import UserError

if TYPE_CHECKING:  # checking files and naming a broken one must not cost the seconds that torch takes to import
    import torch

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PIECE_BYTES = 4 << 20
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known now and whose values are made, by `load()`, when they are written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    pieces: Callable[[], Iterator[memoryview]] | None = None
    """The same as bytes, a few at a time, each gone when the next one comes: for what is only copied."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NamedTensors:
    """Tensors by name, in the order of their files: what all have in common that open a checkpoint, however it is stored."""

    path: Path
    _named: Mapping[str, Any]

    def keys(self) -> list[str]:
        return list(self._named)

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def __len__(self) -> int:
        return len(self._named)

    def _of(self, name: str) -> Any:
        if name not in self._named:
            raise UserError(f"{self.path}: has no tensor named {name}")
        return self._named[name]


def write_file(path: Path, tensors: Mapping[str, torch.Tensor | LazyTensor], hashed: bool = False) -> str | None:
    """Write one file; with `hashed` its sha256 is worked out meanwhile, on another thread, and returned."""
    import torch

    format_names = {getattr(torch, name): format_name for format_name, name in TORCH_NAMES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    # Wider elements first, then by name: every tensor starts at a multiple of its element size, so it can be mapped.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    offset = 0
    for name in names:
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        end = offset + tensors[name].nbytes
        header[name] = {"dtype": format_names[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file, ThreadPoolExecutor(1) as beside:

        def put(content: bytes | memoryview) -> None:
            hashing = beside.submit(digest.update, content) if hashed else None
            file.write(content)
            if hashing is not None:
                hashing.result()

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in _pieces_of(name, tensors[name]):
                put(piece)
    return digest.hexdigest() if hashed else None


def _pieces_of(name: str, source: torch.Tensor | LazyTensor) -> Iterator[memoryview]:
    if isinstance(source, LazyTensor) and source.pieces is not None:
        yield from source.pieces()
    else:
        yield bytes_of(name, source)


def bytes_of(name: str, source: torch.Tensor | LazyTensor) -> memoryview:
    import torch

    tensor = source
    if isinstance(source, LazyTensor):
        tensor = source.load()
        if tuple(tensor.shape) != tuple(source.shape) or tensor.dtype != source.dtype:
            raise ValueError(f"{name}: {source.dtype} {source.shape} announced, {tensor.dtype} {tensor.shape} made")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


@dataclass(frozen=True)
class Entry:
    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class MappedFile:
    """One safetensors file: its header checked against its size at once, its bytes mapped at the first use."""

    def __init__(self, path: Path):
        self.path = path
        self._bytes: torch.Tensor | None = None
        self.entries: dict[str, Entry] = {}
        header, start, self.size = _read_header(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            self.entries[name] = self._checked(name, entry, start)
        end = max((entry.end for entry in self.entries.values()), default=start)
        if end != self.size:
            raise corrupt(path, f"the header describes {end:,} bytes, the file has {self.size:,}")

    def _checked(self, name: str, entry: dict, start: int) -> Entry:
        try:
            dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
            begin, end = (start + int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(self.path, f"the header's entry for {name} is malformed") from error
        if not start <= begin <= end or min(shape, default=0) < 0:
            raise corrupt(self.path, f"the header's entry for {name} is malformed")
        if end > self.size:
            raise corrupt(self.path, f"{name} ends at byte {end:,}, the file has {self.size:,}")
        return Entry(self, dtype, shape, begin, end)

    def copy(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor, or some of its rows, in memory of its own: what is mapped counts as this process's until the end."""
        import torch

        entry, dtype = self._sized(name)
        if not entry.shape or 0 in entry.shape:
            return self.read(name).clone()
        first, last, _ = rows.indices(entry.shape[0])
        row_bytes = (entry.end - entry.begin) // entry.shape[0]
        raw = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.begin + first * row_bytes)
            view = memoryview(raw.numpy())
            while view and (count := file.readinto(view)):
                view = view[count:]
        return raw.view(dtype).view(last - first, *entry.shape[1:])

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, in pieces that share one block of memory."""
        entry, _ = self._sized(name)
        block = memoryview(bytearray(min(PIECE_BYTES, entry.end - entry.begin)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.begin)
            left = entry.end - entry.begin
            while left:
                count = file.readinto(block[:left])
                if not count:
                    raise corrupt(self.path, f"{name} ends {left:,} bytes early")
                yield block[:count]
                left -= count

    def _sized(self, name: str) -> tuple[Entry, torch.dtype]:
        entry = self.entries[name]
        dtype = torch_dtype(self.path, name, entry.dtype)
        if entry.end - entry.begin != math.prod(entry.shape) * dtype.itemsize:
            held = entry.end - entry.begin
            raise corrupt(self.path, f"{name} has {held:,} bytes for {entry.dtype} {list(entry.shape)}")
        return entry, dtype

    def read(self, name: str) -> torch.Tensor:
        import torch

        entry, dtype = self._sized(name)
        if self._bytes is None:
            # A private mapping: pages are read when used, and a write in place never reaches the file.
            self._bytes = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        raw = self._bytes[entry.begin : entry.end]
        if entry.begin % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)


def _read_header(path: Path) -> tuple[dict, int, int]:
    """The header, the offset of the first tensor byte, and the size of the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise corrupt(path, f"a header of {length:,} bytes cannot be in a file of {size:,}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise corrupt(path, "the header is not valid JSON") from error
    if not isinstance(header, dict):
        raise corrupt(path, "the header is not a JSON object")
    return header, 8 + length, size


def torch_dtype(path: Path, name: str, format_name: str) -> torch.dtype:
    import torch

    if format_name not in TORCH_NAMES:
        raise UserError(f"{path}: {name} has dtype {format_name}, which is none of {', '.join(TORCH_NAMES)}")
    return getattr(torch, TORCH_NAMES[format_name])


def corrupt(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: truncated or corrupt safetensors file: {what}", hint="copy or download the checkpoint again"
    )
