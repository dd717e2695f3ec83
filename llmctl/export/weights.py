"""The weights of a checkpoint for those who write them in another form: one at a time, by our names."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from llmctl.models import families, weights
from llmctl.models.config import ModelConfig
from llmctl.models.loading import new_empty, stored_tensors
from llmctl.quantize.stored import open_weights


class Weights:
    """The tensors of a checkpoint by our names, read when asked for; `shapes` are those that the config gives them."""

    def __init__(self, path: Path, config: ModelConfig):
        """Raises UserError where the file does not fit the config. Nothing is read here: names and shapes are compared."""
        self._files = open_weights(path)
        with torch.device("meta"):
            model = new_empty(config)
        self.shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
        family, optional = families.find(config.family), dict(model.named_buffers())
        for _ in weights.load_tensors(family, self.shapes, self._files.keys(), self._meta, optional):
            pass
        self._sources = weights.sources(family, self.shapes, self._files.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def read(self, name: str) -> torch.Tensor:
        """As the checkpoint has it, in memory of its own."""
        source = self._sources[name]
        return source.cut(self._files.copy(source.theirs))

    def get(self, name: str) -> torch.Tensor:
        """The same in float32."""
        return self.read(name).float()

    @property
    def n_values(self) -> int:
        return sum(math.prod(self.shapes[name]) for name in self._sources)

    def _meta(self, name: str) -> torch.Tensor:
        return torch.empty(self._files.shape(name), dtype=self._files.dtype(name), device="meta")
