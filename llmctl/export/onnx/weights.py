"""What graphs need of a checkpoint's weights: those that are made when a file is written, and those in few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmctl.export import weights
from llmctl.models.config import ModelConfig
from llmctl.models.packed import PackedWeight
from llmctl.tensor_file import LazyTensor

RECENT = 3
"""Matrices that are kept unpacked, those of queries, keys and values: scales and codes are made of the same ones."""


class Weights(weights.Weights):
    """`dtype` is what they are written in; what a graph holds otherwise says so itself."""

    def __init__(self, path: Path, config: ModelConfig, dtype: torch.dtype):
        super().__init__(path, config)
        self.dtype = dtype
        self._recent: dict[str, PackedWeight | None] = {}

    def lazy(
        self,
        names: str | Sequence[str],
        shape: Sequence[int],
        change: Callable[..., torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> LazyTensor:
        """`change(*tensors)`, taken in float32, or one tensor as it is."""
        names, dtype = [names] if isinstance(names, str) else list(names), dtype or self.dtype

        def load() -> torch.Tensor:
            if change is None:
                return self.read(names[0]).to(dtype)
            return change(*map(self.get, names)).to(dtype)

        return LazyTensor(tuple(shape), dtype, load)

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint may hold matrices in few bits."""
        return hasattr(self._files, "packed")

    def packed(self, name: str) -> PackedWeight | None:
        """A matrix [out, in] of a quantized module, as it is stored; None for other tensors."""
        if name not in self._recent:
            if len(self._recent) == RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[name] = self._unpacked(name)
        return self._recent[name]

    def _unpacked(self, name: str) -> PackedWeight | None:
        source = self._sources.get(name)
        whole = None if source is None or not self.is_quantized else self._files.packed(source.theirs)
        if whole is None or len(source.sizes) == 1:
            return whole
        first = sum(source.sizes[: source.part])
        return whole.part(first, first + source.sizes[source.part])

    def plain(self, name: str) -> LazyTensor:
        return self.lazy(name, self.shapes[name])
