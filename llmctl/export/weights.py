"""The weights of a checkpoint for those who write them in another form: one at a time, by our names."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from llmctl.errors import UserError
from llmctl.models import families, weights
from llmctl.models.config import ModelConfig
from llmctl.models.loading import new_empty
from llmctl.quantize.stored import open_weights


class Weights:
    """The float32 parameters of a checkpoint by our names, read when asked for."""

    def __init__(self, path: Path, config: ModelConfig):
        self._files = open_weights(path)
        with torch.device("meta"):
            model = new_empty(config)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._sources = weights.sources(families.find(config.family), self.shapes, self._files.keys())
        missing = [name for name in self.shapes if name not in self._sources]
        if missing:
            raise UserError(f"{path}: the checkpoint has no tensor for {missing[0]} ({len(missing)} are missing)")

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def get(self, name: str) -> torch.Tensor:
        source = self._sources[name]
        tensor = source.cut(self._files.copy(source.theirs)).float()
        if tensor.shape != self.shapes[name]:
            raise UserError(f"{name} has shape {list(tensor.shape)}; config.json says {list(self.shapes[name])}")
        return tensor

    @property
    def n_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())
