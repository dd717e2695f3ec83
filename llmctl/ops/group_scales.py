"""Scales of groups of weights, searched for among parts of a group's range: the torch reference and the native kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from llmctl.ops import native
from llmctl.ops.dispatch import cpu_library
from llmctl.ops.quantized_linear import SCALE_DTYPES

REFERENCE_WEIGHTS = 1 << 17
"""So many at a time, that what is made of them stays in a processor's cache."""


class Args(ctypes.Structure):
    """llmctl_group_scales_args of csrc/llmctl.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "importance", "shrinks", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("n_rows", "n_in", "weight_stride", "group_size", "n_shrinks")),
        ("least_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("bits", "is_symmetric", "scales_dtype")),
    ]


def group_scales(
    weight_NK: torch.Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    shrinks: Sequence[float],
    importance_K: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, which `dtype` (float16 or bfloat16) holds, and zero points, whole numbers: both [N, J] float32.

    Of the parts `shrinks` of each group's range the one is taken whose nearest codes have the least squared error, each
    column's times its importance; of equals the first. Symmetric codes have the zero 2^(bits - 1), and negative shrinks turn
    their sign. The kernel takes float32.
    """
    fits = weight_NK.device.type == "cpu" and weight_NK.dtype == torch.float32 and weight_NK.stride(1) == 1
    library = cpu_library() if fits else None
    if library is None:
        return reference(weight_NK, group_size, bits, symmetric, shrinks, importance_K, dtype)
    n_rows, n_in = weight_NK.shape
    scales_NJ = torch.empty(n_rows, -(-n_in // group_size))
    zeros_NJ = torch.empty_like(scales_NJ)
    tried = torch.tensor(shrinks, dtype=torch.float32)
    importance_K = None if importance_K is None else importance_K.to(torch.float32).contiguous()
    args = Args(
        weight_NK.data_ptr(),
        None if importance_K is None else importance_K.data_ptr(),
        *(tensor.data_ptr() for tensor in (tried, scales_NJ, zeros_NJ)),
        *(n_rows, n_in, weight_NK.stride(0), group_size, len(tried)),
        least_scale(dtype),
        *(bits, symmetric, SCALE_DTYPES[dtype]),
    )
    native.call(library, "llmctl_group_scales", ctypes.byref(args))
    return scales_NJ, zeros_NJ


def least_scale(dtype: torch.dtype) -> float:
    """What is not above it is no scale."""
    return torch.finfo(torch.float16).tiny if dtype == torch.float16 else 1e-30


def in_groups(weight_NK: torch.Tensor, size: int) -> torch.Tensor:
    """[N, J, G]; the last group is filled up with zeros."""
    return torch.nn.functional.pad(weight_NK, (0, -weight_NK.shape[1] % size)).unflatten(1, (-1, size))


def reference(weight_NK, group_size, bits, symmetric, shrinks, importance_K=None, dtype=torch.bfloat16):
    """The specification of `group_scales`."""
    weights_JG = None if importance_K is None else in_groups(importance_K[None].float(), group_size)[0]
    rows = max(1, REFERENCE_WEIGHTS // max(1, weight_NK.shape[1]))
    parts = [
        _best(in_groups(part_NK, group_size), bits, symmetric, dtype, weights_JG, shrinks)
        for part_NK in weight_NK.split(rows)
    ]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _best(groups_NJG, bits: int, symmetric: bool, dtype, weights_JG, shrinks) -> tuple[torch.Tensor, torch.Tensor]:
    best_NJ = torch.full(groups_NJG.shape[:2], torch.inf)
    scales_NJ, zeros_NJ = torch.ones_like(best_NJ), torch.zeros_like(best_NJ)
    for shrink in shrinks:
        tried_NJ, middle_NJ = _of_range(groups_NJG, bits, symmetric, dtype, shrink)
        codes = (groups_NJG * (1 / tried_NJ)[..., None]).round_().add_(middle_NJ[..., None]).clamp_(0, (1 << bits) - 1)
        errors = ((codes - middle_NJ[..., None]) * tried_NJ[..., None]).sub_(groups_NJG).square_()
        errors_NJ = (errors if weights_JG is None else errors.mul_(weights_JG)).sum(-1)
        better_NJ = errors_NJ < best_NJ
        best_NJ = torch.where(better_NJ, errors_NJ, best_NJ)
        scales_NJ = torch.where(better_NJ, tried_NJ, scales_NJ)
        zeros_NJ = torch.where(better_NJ, middle_NJ, zeros_NJ)
    return scales_NJ, zeros_NJ


def _of_range(groups_NJG, bits: int, symmetric: bool, dtype, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that spread the codes over a part of each group's range; zero keeps a code of its own."""
    top = (1 << bits) - 1
    if symmetric:
        scales = groups_NJG.abs().amax(-1) * (shrink * 2 / top)
    else:
        low, high = groups_NJG.amin(-1).clamp(max=0) * shrink, groups_NJG.amax(-1).clamp(min=0) * shrink
        scales = (high - low) / top
    scales = torch.where(scales.abs() > least_scale(dtype), scales, 1.0).to(dtype).float()
    if symmetric:
        return scales, torch.full_like(scales, 1 << (bits - 1))
    return scales, (-low / scales).round_().clamp_(0, top)
