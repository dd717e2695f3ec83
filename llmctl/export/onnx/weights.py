"""The weights of a checkpoint under our names, read when they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmctl.models import families, weights
from llmctl.models.config import ModelConfig
from llmctl.models.loading import new_empty, stored_tensors
from llmctl.quantize.stored import QuantizedFiles, open_weights
from llmctl.tensor_file import LazyTensor


class Weights:
    """`dtype` is what they are written in; what a graph holds otherwise says so itself."""

    def __init__(self, path: Path, config: ModelConfig, dtype: torch.dtype):
        """Raises UserError where the file lacks a weight that the config asks for."""
        self.dtype, self._files = dtype, open_weights(path)
        with torch.device("meta"):
            model = new_empty(config)
        self.shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
        family, optional = families.find(config.family), dict(model.named_buffers())
        # Nothing is read here: names and shapes are compared, as loading does.
        for _ in weights.load_tensors(family, self.shapes, self._files.keys(), self._meta, optional):
            pass
        self._sources = weights.sources(family, self.shapes, self._files.keys())

    def has(self, name: str) -> bool:
        return name in self._sources

    def read(self, name: str) -> torch.Tensor:
        """As the checkpoint has it, in memory of its own."""
        source = self._sources[name]
        return source.cut(self._files.copy(source.theirs))

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
            return change(*(self.read(name).float() for name in names)).to(dtype)

        return LazyTensor(tuple(shape), dtype, load)

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint holds matrices in few bits."""
        return isinstance(self._files, QuantizedFiles)

    def packed(self, name: str):
        """A matrix [out, in] of a quantized module, as it is stored; None for other tensors."""
        source = self._sources.get(name)
        whole = None if source is None or not self.is_quantized else self._files.packed(source.theirs)
        if whole is None or len(source.sizes) == 1:
            return whole
        first = sum(source.sizes[: source.part])
        return whole.part(first, first + source.sizes[source.part])

    def plain(self, name: str) -> LazyTensor:
        return self.lazy(name, self.shapes[name])

    def _meta(self, name: str) -> torch.Tensor:
        return torch.empty(self._files.shape(name), dtype=self._files.dtype(name), device="meta")
