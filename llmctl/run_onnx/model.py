"""What all exported models have in common with models of torch."""

from __future__ import annotations

import torch

from llmctl.models.config import ModelConfig
from llmctl.run_onnx.graph_session import GraphSession


class OnnxModule:
    """A model whose first or only graph is `graph`."""

    encoder, n_virtual = None, 0

    def __init__(self, graph: GraphSession, config: ModelConfig):
        self.graph, self.config = graph, config

    @property
    def device(self) -> torch.device:
        return self.graph.device

    def eval(self):
        return self
