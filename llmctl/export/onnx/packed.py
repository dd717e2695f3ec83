"""Matrices that a checkpoint holds in few bits (llmctl quantize, GPTQ, AWQ), code for code as MatMulNBits takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llmctl.export.onnx.quantization import Groups, packed
from llmctl.export.onnx.weights import Weights
from llmctl.models.packed import AffineWeight
from llmctl.tensor_file import LazyTensor

SMALLEST, LARGEST = 16, 256
"""Group sizes of MatMulNBits, which are powers of 2."""
WHOLE_ROW = 64
"""Where one scale is for a row. onnxruntime rounds inputs by groups of the same size: small ones round less."""


def packed_groups(weights: Weights, names: Sequence[str]) -> Groups | None:
    """Of one matrix, or of several one below the other; None where they are not all in codes of one kind."""
    parts = [weights.packed(name) for name in names]
    if not all(isinstance(part, AffineWeight) for part in parts) or len({_kind(part) for part in parts}) > 1:
        return None
    first, sizes = parts[0], [part.shape[0] for part in parts]
    if len(parts) > 1 and any(part.columns_K is not None for part in parts):
        return None  # each has an order of its own
    block, bits = _block(first), 4 if first.bits <= 4 else 8
    if block < SMALLEST:
        return None
    n_out, n_in = sum(sizes), first.shape[1]
    n_groups = -(-n_in // block)
    has_zeros = first.zeros_NJ is not None or first.bits not in (4, 8)

    def all_of(make, dtype: torch.dtype, *shape: int) -> LazyTensor:
        return LazyTensor(
            (n_out, *shape), dtype, lambda: torch.cat([make(weights.packed(name)) for name in names]).to(dtype)
        )

    def codes(part: AffineWeight) -> torch.Tensor:
        codes_NK = F.pad(part.codes_NK, (0, n_groups * block - n_in))
        return packed(codes_NK.unflatten(1, (n_groups, block)), bits)

    def scales(part: AffineWeight) -> torch.Tensor:
        return _spread(part.scales_NJ, part, n_groups, block)

    def zeros(part: AffineWeight) -> torch.Tensor:
        middle = torch.full_like(part.scales_NJ, 1 << (part.bits - 1), dtype=torch.uint8)
        zeros_NJ = _spread(middle if part.zeros_NJ is None else part.zeros_NJ, part, n_groups, block)
        return packed(F.pad(zeros_NJ, (0, n_groups % 2 if bits == 4 else 0)), bits)

    zeros_width = -(-n_groups * bits // 8)
    return Groups(
        bits,
        block,
        (n_out, n_in),
        all_of(scales, weights.dtype, n_groups),
        all_of(codes, torch.uint8, n_groups, block * bits // 8),
        all_of(zeros, torch.uint8, zeros_width) if has_zeros else None,
        first.columns_K,
    )


def _kind(part: AffineWeight) -> tuple:
    return part.bits, part.group_size, part.zeros_NJ is None, part.shape[1]


def _block(part: AffineWeight) -> int:
    """The largest group of MatMulNBits' that lies within one of the matrix's."""
    if part.group_size >= part.shape[1]:
        return WHOLE_ROW
    return min(part.group_size & -part.group_size, LARGEST)


def _spread(values_NJ: torch.Tensor, part: AffineWeight, n_groups: int, block: int) -> torch.Tensor:
    """One for each of the smaller groups."""
    firsts = torch.arange(n_groups) * block // min(part.group_size, n_groups * block)
    return values_NJ[:, firsts]
