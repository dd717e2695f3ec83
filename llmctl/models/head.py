"""From hidden states to logits."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models import config, norm
from llmctl.models.ffn import ACTIVATIONS
from llmctl.models.linear import Linear
from llmctl.ops.linear import linear


class HeadTransform(nn.Module):
    """norm(activation(dense(x))) in front of the vocabulary matrix."""

    def __init__(self, spec: config.HeadTransform, d_model: int):
        super().__init__()
        self.dense = Linear(d_model, d_model)
        self.activation = ACTIVATIONS[spec.activation]
        self.norm = norm.build(spec.norm, d_model)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.norm(self.activation(self.dense(x_BTD)))


def logits(
    head: config.Head, x_BTD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> torch.Tensor:
    """softcap(x @ weight.T + bias), [B, T, V]."""
    return softcapped(head, linear(x_BTD, weight_VD, bias_V))


def softcapped(head: config.Head, logits_BTV: torch.Tensor) -> torch.Tensor:
    """The logits, [..., V], as far as the head lets them grow."""
    return logits_BTV if head.softcap is None else head.softcap * torch.tanh(logits_BTV / head.softcap)
