"""Blocks of 32 values with one scale as codes and scales, for matrix products that need no dequantized weights."""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 32
PACKED = {"Q8_0": 8, "Q4_0": 4}
"""Types with one scale to a block and no minimum, and their bits: value = (code - 2^(bits - 1)) * scale."""


def unpacked(data: np.ndarray, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K] and scales float32 [N, K / 32] of the bytes [N, blocks * size] of a matrix."""
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, 2 + BLOCK * PACKED[kind] // 8)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    body = blocks[..., 2:]
    if kind == "Q8_0":
        codes = body ^ np.uint8(128)  # int8 as its distance from -128
    else:
        codes = np.concatenate([body & np.uint8(15), body >> np.uint8(4)], axis=-1)
    return torch.from_numpy(codes.reshape(len(data), -1)), torch.from_numpy(scales)
