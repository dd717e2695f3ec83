"""Checkpoint directories: how a command names one, and its tensors in one safetensors file or in shards."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.errors import UserError
from llmctl.files import check_free_space, read_json, staged_directory, write_atomic
from llmctl.tensor_file import (
    TORCH_NAMES,
    Entry,
    LazyTensor,
    MappedFile,
    NamedTensors,
    corrupt,
    torch_dtype,
    write_file,
)

if TYPE_CHECKING:  # resolving a name and reporting a wrong one must not cost the seconds that torch takes to import
    import torch

__all__ = [
    "LazyTensor",
    "TensorFiles",
    "check_free_space",
    "open_tensors",
    "read_json",
    "resolve_model",
    "save_tensors",
    "staged_directory",
    "write_atomic",
]

GGUF_SUFFIX = ".gguf"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def resolve_model(model: str | os.PathLike) -> Path:
    """The checkpoint directory that a MODEL argument names; `-` reads its path, one line, from standard input."""
    if str(model) == "-":
        line = sys.stdin.buffer.readline(65536)
        if not line.strip():
            raise UserError(
                "standard input: a checkpoint path was expected, but it is empty",
                hint="the command before this one in the pipe has printed no path; see its message",
            )
        model = os.fsdecode(line.rstrip(b"\r\n"))
    path = Path(model)
    if not os.path.exists(path):
        raise UserError(f"{model}: no such checkpoint", hint="give the path of a local checkpoint directory")
    if not path.is_dir() and path.suffix != GGUF_SUFFIX:
        raise UserError(f"{model}: a checkpoint is a directory with config.json or a .gguf file, this is another file")
    return path


def save_tensors(
    directory: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    shard_bytes: float = 5e9,
    stem: str = "model",
    hashed: bool = False,
) -> dict[str, str]:
    """Write `{stem}.safetensors`, or above `shard_bytes` numbered shards and their index, one tensor in memory at a time.

    Values keep their dtypes. With `hashed` returns the sha256 of each file of tensors by its name, worked out while it is
    written. Raises `UserError` when the disk has no room for them.
    """
    check_free_space(directory, sum(tensor.nbytes for tensor in tensors.values()))
    shards = _plan_shards(tensors, shard_bytes)
    files = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    digests = {
        file: write_file(Path(directory, file), {name: tensors[name] for name in names}, hashed)
        for file, names in zip(files, shards)
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, names in zip(files, shards) for name in names},
        }
        write_atomic(Path(directory, f"{stem}.safetensors.index.json"), json.dumps(index, indent=2).encode())
    return {file: digest for file, digest in digests.items() if digest is not None}


def _plan_shards(tensors: Mapping[str, torch.Tensor | LazyTensor], shard_bytes: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


class TensorFiles(NamedTensors):
    """The tensors of a checkpoint by name, over one safetensors file or several."""

    _named: dict[str, Entry]

    def __init__(self, path: Path, entries: dict[str, Entry]):
        self.path, self._named = path, entries

    def get(self, name: str) -> torch.Tensor:
        """The tensor, mapped from the file: its pages are read when they are used."""
        return self._of(name).file.read(name)

    def copy(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor, or some of its rows, read into memory that is free again when the tensor is."""
        return self._of(name).file.copy(name, rows)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape

    def dtype_name(self, name: str) -> str:
        """As torch names it, without importing torch; for a dtype that llmctl cannot read, as the file does."""
        stored = self._of(name).dtype
        return TORCH_NAMES.get(stored, stored)

    def nbytes(self, name: str) -> int:
        entry = self._of(name)
        return entry.end - entry.begin

    def dtype(self, name: str) -> torch.dtype:
        entry = self._of(name)
        return torch_dtype(entry.file.path, name, entry.dtype)

    def lazy(self, name: str) -> LazyTensor:
        """The tensor as `save_tensors` takes it, so that a copy of a checkpoint needs no tensor in memory."""
        entry = self._of(name)
        pieces = functools.partial(entry.file.pieces, name)
        return LazyTensor(entry.shape, self.dtype(name), functools.partial(self.copy, name), pieces)


def open_tensors(path: str | os.PathLike, stem: str = "model") -> TensorFiles:
    """Map the tensors of a `.safetensors` or `.gguf` file, or of a directory with `{stem}.safetensors` or shards and an index.

    Headers are read and checked against the files' sizes here. Raises `UserError` for a missing or corrupt file and
    for a checkpoint that exists as a pickle only.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise _is_pickle(path)
    if path.suffix == GGUF_SUFFIX and path.is_file():
        from llmctl.gguf.file import GgufTensors

        return GgufTensors(path)
    if path.is_dir():
        index = path / f"{stem}.safetensors.index.json"
        single = path / f"{stem}.safetensors"
        if not single.exists() and index.exists():
            return TensorFiles(path, _open_shards(index))
        if not single.exists():
            raise _no_tensors(path, single.name)
        return TensorFiles(path, MappedFile(single).entries)
    return TensorFiles(path, MappedFile(path).entries)


def _open_shards(index: Path) -> dict[str, Entry]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map")
    files: dict[str, MappedFile] = {}
    for file in sorted(set(weight_map.values())):
        shard = index.parent / file
        if shard.parent != index.parent:
            raise UserError(f"{index}: the shard {file} lies outside the checkpoint")
        if not shard.exists():
            raise UserError(
                f"{shard}: this shard is missing ({len(set(weight_map.values()))} are listed in {index.name})",
                hint="copy or download the checkpoint again",
            )
        files[file] = MappedFile(shard)
    for name, file in weight_map.items():
        if name not in files[file].entries:
            raise corrupt(index.parent / file, f"{index.name} places {name} there, but the file lacks it")
    return {name: files[file].entries[name] for name, file in weight_map.items()}


def _no_tensors(directory: Path, expected: str) -> UserError:
    if any(directory.glob("*.onnx")):
        return UserError(
            f"{directory}: has no {expected}, but an exported model, which is for running only",
            hint="give the checkpoint that it was made of (its llmctl.json says which)",
        )
    for file in sorted(directory.iterdir()):
        if file.suffix in PICKLE_SUFFIXES:
            return _is_pickle(file)
    return UserError(f"{directory}: has no {expected}", hint="a checkpoint holds config.json and model.safetensors")


def _is_pickle(path: Path) -> UserError:
    return UserError(
        f"{path}: a pickle, which can run code when it is opened; llmctl reads safetensors only",
        hint='where you trust its source, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('OLD').save_pretrained('NEW')\"",
    )
