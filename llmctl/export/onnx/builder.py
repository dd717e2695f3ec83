"""What every part of a model needs to write itself into a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmctl.export.onnx.graph import Graph, Value
from llmctl.export.onnx.quantization import Quantization
from llmctl.export.onnx.weights import Weights


@dataclass
class Builder:
    """`fuse`: rotations, and sums with norms, are operators of onnxruntime's own (domain com.microsoft); `groups`: so is
    the attention of a decoder, as GroupQueryAttention, which counts tokens by row and so is in all layers or in none.
    `adapted` are the modules to which an adapter may be given when the graph is run."""

    graph: Graph
    weights: Weights
    fuse: bool = False
    groups: bool = False
    quantization: Quantization | None = None
    adapted: frozenset[str] = frozenset()

    def weight(self, name: str) -> Value:
        """A tensor of the checkpoint as it is."""
        return self.graph.weight(name, self.weights.plain(name))

    def table(self, tensor: torch.Tensor) -> Value:
        """A table that was made here, in the dtype of the graph."""
        return self.graph.constant(tensor.to(self.graph.dtype))
