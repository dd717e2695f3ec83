"""Quantized matrices as the kernels take them, kept from one process to the next in the user's cache directory.

To lay out a matrix takes longer than to read it laid out. The files are copied to huge pages and not left mapped: mapped
pages have 4 KB, from which every token would be slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from llmctl import files
from llmctl.errors import UserError
from llmctl.models.packed import LaidOutWeight
from llmctl.ops import huge_pages
from llmctl.ops import quantized_linear as ops
from llmctl.tensor_file import MappedFile, write_file

log = logging.getLogger("llmctl")

VERSION = 1
"""Raised when the layout, or what is kept of it, changes."""
MIN_BYTES = 64 << 20
"""What is smaller is laid out in no time."""
MAX_BYTES = 32 << 30
"""Of all files together; beyond that those go that were not used for the longest time."""
FILE = "laid-out.safetensors"
_PARTS = ("codes_PB", "scales_PBU16", "zeros_PBU16")


class LaidOut:
    """The matrices of one checkpoint by the names of their layers; empty where none are kept, or of another state of it."""

    def __init__(self, checkpoint: str | os.PathLike):
        self._place = _place(Path(checkpoint))
        self._file: MappedFile | None = None
        if self._place is not None and (self._place / FILE).exists():
            with contextlib.suppress(UserError, OSError):
                self._file = MappedFile(self._place / FILE)
                os.utime(self._place)

    def find(self, layer: str) -> LaidOutWeight | None:
        if self._file is None or f"{layer}.sizes" not in self._file.entries:
            return None
        parts = {name: self._read(f"{layer}.{name}") for name in (*_PARTS, "columns_K")}
        columns_K = parts.pop("columns_K")
        return LaidOutWeight(ops.QuantizedWeight(*self._file.read(f"{layer}.sizes").tolist(), **parts), columns_K)

    def _read(self, name: str) -> torch.Tensor | None:
        return huge_pages.contiguous(self._file.read(name)) if name in self._file.entries else None

    def keep(self, layers: Mapping[str, LaidOutWeight]) -> None:
        """Write them for the next process. Does nothing for few bytes, and where there is no room."""
        tensors = {f"{name}.{part}": value for name, layer in layers.items() for part, value in _parts(layer).items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        # Of the processes of one run the first one writes.
        if self._file is not None or self._place is None or size < MIN_BYTES or os.environ.get("RANK", "0") != "0":
            return
        try:
            files.check_free_space(self._place, 2 * size)
            _make_room(self._place.parent, size)
            with files.staged_directory(self._place, overwrite=True) as folder:
                write_file(folder / FILE, tensors)
        except (OSError, UserError) as error:
            log.debug("weights laid out for the kernels are not kept: %s", error)


def _parts(layer: LaidOutWeight) -> dict[str, torch.Tensor]:
    weight = layer.quantized
    sizes = torch.tensor([weight.bits, weight.n_out, weight.n_in, weight.unit])
    parts = {"sizes": sizes, "columns_K": layer.columns_K, **{name: getattr(weight, name) for name in _PARTS}}
    return {name: value for name, value in parts.items() if value is not None}


def _place(checkpoint: Path) -> Path | None:
    """The directory that is this checkpoint's as long as its files are neither changed nor replaced; None: none is wanted."""
    folder = os.environ.get("LLMCTL_CACHE")
    if folder == "none":
        return None
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmctl"
    try:
        inside = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("config.json")]
        sources = [checkpoint] if checkpoint.is_file() else sorted(inside)
        state = [(path.name, *_state(path)) for path in sources]
        known = json.dumps([VERSION, str(checkpoint.resolve()), state])
        return Path(folder or user.expanduser()) / "laid-out" / hashlib.sha256(known.encode()).hexdigest()[:32]
    except (OSError, RuntimeError):  # no home directory
        return None


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _make_room(folder: Path, needed: int) -> None:
    """Of the kept files, the ones used last stay."""
    kept = sorted(folder.glob(f"*/{FILE}"), key=lambda path: path.parent.stat().st_mtime, reverse=True)
    total = needed
    for path in kept:
        total += path.stat().st_size
        if total > MAX_BYTES:
            shutil.rmtree(path.parent, ignore_errors=True)
