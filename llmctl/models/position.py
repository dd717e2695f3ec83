"""Positions: each kind implements the hooks that it needs (`embed` adds to the embedding, `rotate` turns queries and keys)."""

from __future__ import annotations

import math

import torch

from llmctl.errors import UserError
from llmctl.models import config


class RotaryTable:
    """cos and sin of position x frequency, float32, computed once and grown when a longer sequence comes."""

    def __init__(self, rope: config.Rope, head_dim: int, max_positions: int | None):
        self.rope, self.dims, self.max_positions = rope, rope.dims or head_dim, max_positions
        self._cos = self._sin = torch.empty(0, self.dims)

    def lookup(self, positions_BT: torch.Tensor | None, offset: int, end: int, device: torch.device):
        """(cos, sin) of shape [T, K] for positions `offset` to `end`, or [B, 1, T, K] where rows have their own."""
        if self._cos.shape[0] < end or self._cos.device != device:
            self._grow(max(end, 2 * self._cos.shape[0]), device)
        if positions_BT is None:
            return self._cos[offset:end], self._sin[offset:end]
        return self._cos[positions_BT].unsqueeze(1), self._sin[positions_BT].unsqueeze(1)

    def _grow(self, length: int, device: torch.device) -> None:
        with torch.inference_mode(False), torch.no_grad():
            frequencies = rotary_frequencies(self.rope, self.dims).to(device)
            angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
            # The rotation pairs element i with i + K/2 (the Hugging Face layout), not neighbours.
            self._cos, self._sin = (torch.cat([f, f], dim=-1) for f in (angles.cos(), angles.sin()))


def rotary_frequencies(rope: config.Rope, head_dim: int) -> torch.Tensor:
    """Radians per position, [K / 2] float32: theta^(-2i/K), rescaled as `rope.scaling` says.

    Raises UserError for a rope_type that llmctl does not have.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    raise UserError(f"rope_type {scaling['rope_type']!r} is not supported", "supported: default, linear, llama3")


def _llama3_frequencies(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Llama 3.1's rule: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    share = share.clamp(0, 1)
    return (1 - share) * frequencies / scaling["factor"] + share * frequencies


def rotate(x_BHTK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + K/2) of a head by its angle; elements beyond the tables' width stay as they are."""
    dims = cos.shape[-1]
    if dims < x_BHTK.shape[-1]:
        return torch.cat([rotate(x_BHTK[..., :dims], cos, sin), x_BHTK[..., dims:]], dim=-1)
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BHTK * cos + turned * sin).to(x_BHTK.dtype)
