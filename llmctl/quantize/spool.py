"""Quantized matrices on disk until the checkpoint is written: memory holds one at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from llmctl.tensor_file import LazyTensor, MappedFile, torch_dtype, write_file


class Spool:
    """A directory with one small file per module."""

    def __init__(self, directory: Path):
        self._directory = directory
        directory.mkdir()
        self._files: dict[str, MappedFile] = {}

    def add(self, module: str, tensors: dict[str, torch.Tensor]) -> None:
        """`tensors` by their endings."""
        path = self._directory / f"{len(self._files)}.safetensors"
        write_file(path, tensors)
        self._files[module] = MappedFile(path)

    def tensors(self) -> dict[str, LazyTensor]:
        """All of them by their whole names."""
        return {
            f"{module}.{ending}": _lazy(file, ending) for module, file in self._files.items() for ending in file.entries
        }

    def remove(self) -> None:
        shutil.rmtree(self._directory)


def _lazy(file: MappedFile, name: str) -> LazyTensor:
    entry = file.entries[name]
    return LazyTensor(entry.shape, torch_dtype(file.path, name, entry.dtype), lambda: file.copy(name))
