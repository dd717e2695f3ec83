"""Normalization layers."""

from __future__ import annotations

from torch import nn

from llmctl.models import config


def build(norm: config.Norm, width: int) -> nn.Module:
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[norm.kind](width, eps=norm.eps)
