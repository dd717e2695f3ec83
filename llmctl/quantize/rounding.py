"""Round-to-nearest: the scales of groups, and codes by them."""

from __future__ import annotations

import torch

from llmctl.models.packed import AffineWeight, FloatWeight, TableWeight
from llmctl.ops.group_scales import group_scales, in_groups
from llmctl.quantize.scheme import TABLE_BLOCK, Scheme

SHRINKS = (1.06, 1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6, 0.55)
"""Parts of a group's range that the search tries: to cut off its ends may cost less than coarser steps do."""


def scales_and_zeros(
    weight_NK: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    importance_K: torch.Tensor | None = None,
    searches: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [N, J] float32 that `dtype` and 16 bits hold, and zero points (float32, whole numbers; None: symmetric).

    Below 8 bits, where `searches`, they are those of the range's part with the least squared error, each column's weighted
    by `importance_K`; else those of the whole range.
    """
    shrinks = SHRINKS if scheme.bits < 8 and searches else (1.0,)
    if scheme.symmetric and len(shrinks) > 1:  # there is one code more below zero, for the side that needs it
        shrinks = [sign * shrink for shrink in SHRINKS for sign in (1, -1)]
    scales_NJ, zeros_NJ = group_scales(
        weight_NK,
        scheme.size(weight_NK.shape[1]),
        scheme.bits,
        scheme.symmetric,
        shrinks,
        importance_K,
        held_dtype(dtype),
    )
    return scales_NJ, None if scheme.symmetric else zeros_NJ


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of scales which `dtype` and 16 bits hold, as kernels read them."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def held(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest scales in `held_dtype`; float32."""
    return scales.to(held_dtype(dtype)).float()


def codes_of(groups_NJG: torch.Tensor, scales_NJ: torch.Tensor, zeros_NJ: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes, as float32."""
    codes = (groups_NJG / scales_NJ[..., None]).round_().add_(zeros_NJ[..., None])
    return codes.clamp_(0, (1 << bits) - 1)


def dequantize(codes_NJG: torch.Tensor, scales_NJ: torch.Tensor, zeros_NJ: torch.Tensor) -> torch.Tensor:
    return (codes_NJG - zeros_NJ[..., None]) * scales_NJ[..., None]


def affine(
    weight_NK: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    importance_K: torch.Tensor | None = None,
    searches: bool = True,
) -> AffineWeight:
    """The matrix (float32) in integers of `scheme.bits`, with scales in `dtype` (see `scales_and_zeros`)."""
    scales_NJ, zeros_NJ = scales_and_zeros(weight_NK, scheme, dtype, importance_K, searches)
    size = scheme.size(weight_NK.shape[1])
    middle_NJ = torch.full_like(scales_NJ, 1 << (scheme.bits - 1)) if zeros_NJ is None else zeros_NJ
    codes_NJG = codes_of(in_groups(weight_NK, size), scales_NJ, middle_NJ, scheme.bits)
    codes_NK = codes_NJG.flatten(1)[:, : weight_NK.shape[1]].to(torch.uint8).contiguous()
    zeros_NJ = None if zeros_NJ is None else zeros_NJ.to(torch.uint8)
    return AffineWeight(codes_NK, scales_NJ.to(dtype), zeros_NJ, scheme.bits, size)


def in_fp8(weight_NK: torch.Tensor, dtype: torch.dtype) -> FloatWeight:
    """e4m3 with one scale for a row, which takes the row's largest value to the largest of the format."""
    scales_N1 = weight_NK.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    scales_N1 = torch.where(scales_N1 > 0, scales_N1, 1.0).to(dtype)
    limit = torch.finfo(torch.float8_e4m3fn).max
    return FloatWeight((weight_NK / scales_N1.float()).clamp(-limit, limit).to(torch.float8_e4m3fn), scales_N1)


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution with a zero among them (arXiv:2305.14314, appendix E)."""
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Of the positive codes in their order: a sign, two bits of exponent, one of fraction; the largest is 1."""


def table_of(kind: str) -> torch.Tensor:
    """The 16 values of "nf4" or "fp4", float32, by their codes."""
    if kind == "nf4":
        return torch.tensor(_NF4)
    positive = torch.tensor(_FP4_TWELFTHS) / 12
    return torch.cat([positive, -positive])


def in_table(weight_NK: torch.Tensor, kind: str) -> TableWeight:
    """The nearest values of a table to the matrix over the largest of each block of its flattened weights."""
    table_16 = table_of(kind)
    order = table_16.argsort()
    bounds = (table_16[order[:-1]] + table_16[order[1:]]) / 2
    flat = weight_NK.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % TABLE_BLOCK)).view(-1, TABLE_BLOCK)
    scales_B = blocks.abs().amax(1)
    nearest = torch.bucketize((blocks * (1 / scales_B.clamp(min=1e-38))[:, None]).clamp_(-1, 1), bounds, out_int32=True)
    codes = order[nearest].to(torch.uint8).flatten()[: len(flat) + len(flat) % 2]
    return TableWeight((codes[::2] << 4) | codes[1::2], table_16, scales_B, TABLE_BLOCK, tuple(weight_NK.shape))


def in_llm_int8(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] and the largest of each row, float32 [N]; the matrix passes through float16, as bitsandbytes has it."""
    half_NK = weight_NK.to(torch.float16)
    largest_N = half_NK.abs().amax(1).float()
    return (half_NK * (127.0 / largest_N.clamp(min=1e-38))[:, None]).round_().to(torch.int8), largest_N
