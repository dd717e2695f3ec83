"""Feed-forward layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.models import config

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Mlp(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, spec: config.Mlp, d_model: int):
        super().__init__()
        self.up_proj = nn.Linear(d_model, spec.d_ff, bias=spec.bias)
        self.down_proj = nn.Linear(spec.d_ff, d_model, bias=spec.bias)
        self.activation = _ACTIVATIONS[spec.activation]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x_BTD)))


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)), arXiv:2002.05202."""

    def __init__(self, spec: config.GatedMlp, d_model: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, spec.d_ff, bias=spec.bias)
        self.up_proj = nn.Linear(d_model, spec.d_ff, bias=spec.bias)
        self.down_proj = nn.Linear(spec.d_ff, d_model, bias=spec.bias)
        self.activation = _ACTIVATIONS[spec.activation]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def build(spec: config.Mlp | config.GatedMlp, d_model: int) -> nn.Module:
    return {config.Mlp: Mlp, config.GatedMlp: GatedMlp}[type(spec)](spec, d_model)
