"""Normalization layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.models import config
from llmctl.ops.norm import layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's, in one pass for inference on a CPU."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, in one pass for inference on a CPU."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return layer_norm(x_BTD, self.weight, self.bias, self.eps)


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm whose stored weight is the distance from `offset`; the product is taken in float32."""

    def __init__(self, width: int, eps: float, offset: float):
        super().__init__(width, eps)
        self.offset = offset

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_BTD, self.weight, self.eps, self.offset)


class CastingRMSNorm(nn.RMSNorm):
    """RMSNorm of a float32 residual stream, back in the weight's dtype."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_BTD, self.normalized_shape, eps=self.eps).to(self.weight.dtype) * self.weight


def build(norm: config.Norm | None, width: int) -> nn.Module:
    """The layer that a value describes; None is the identity."""
    if norm is None:
        return nn.Identity()
    if norm.casts:
        return CastingRMSNorm(width, eps=norm.eps)
    if norm.offset:
        return OffsetRMSNorm(width, norm.eps, norm.offset)
    return {"rms": RMSNorm, "layer": LayerNorm}[norm.kind](width, eps=norm.eps)
