"""The matrix product with weights of 4 or 8 bits in groups, as `llmctl_quantized_linear` of csrc/llmctl.h takes them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, cpu_library, is_inference

RUN = 64
"""Rows of codes are filled up to a multiple of this."""


class Args(ctypes.Structure):
    """llmctl_quantized_weight of csrc/llmctl.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("group_size", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("bits", "scales_dtype")),
    ]


@dataclass(frozen=True)
class QuantizedWeight:
    """Weights [N, K] as (code - zero) * scale; `codes_NR` uint8 laid out by `packed`.

    `scales_NJ` float32 or bfloat16 and `zeros_NJ` uint8 (None: the middle of the range) are one for each of the
    ceil(K / group_size) groups of a row. `group_size` is a multiple of 32, or at least K.
    """

    bits: int
    group_size: int
    n_in: int
    codes_NR: torch.Tensor
    scales_NJ: torch.Tensor
    zeros_NJ: torch.Tensor | None = None


def packed(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, row bytes] of codes below 2^bits: one to a byte, or 64 to 32 bytes with number i + 32 above number i."""
    codes_NK = F.pad(codes_NK.to(torch.uint8), (0, -codes_NK.shape[1] % RUN))
    if bits == 8:
        return codes_NK.contiguous()
    lower, upper = codes_NK.unflatten(1, (-1, 2, 32)).unbind(2)
    return (lower | (upper << 4)).flatten(1)


def unpacked(weight: QuantizedWeight) -> torch.Tensor:
    """The codes again, uint8 [N, K]."""
    codes = weight.codes_NR
    if weight.bits == 4:
        bytes_NR32 = codes.unflatten(1, (-1, 32))
        codes = torch.stack([bytes_NR32 & 15, bytes_NR32 >> 4], 2).flatten(1)
    return codes[:, : weight.n_in]


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] weights, rounded once."""
    zeros = 1 << (weight.bits - 1) if weight.zeros_NJ is None else _of_each(weight, weight.zeros_NJ.float())
    return ((unpacked(weight).float() - zeros) * _of_each(weight, weight.scales_NJ.float())).to(dtype)


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] -> [..., N] in the dtype of x. A row has the same bits in any batch where the kernel runs: CPU, no gradient."""
    library = cpu_library() if is_inference(x, bias) else None
    if library is None:
        return F.linear(x, dequantized(weight, x.dtype), bias)
    n_out = weight.codes_NR.shape[0]
    if x.shape[-1] != weight.n_in:
        raise ValueError(f"x has {x.shape[-1]} columns, the weights {weight.n_in}")
    rows = x.reshape(-1, weight.n_in)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(*x.shape[:-1], n_out)
    args = Args(
        weight.codes_NR.data_ptr(),
        weight.scales_NJ.data_ptr(),
        None if weight.zeros_NJ is None else weight.zeros_NJ.data_ptr(),
        weight.group_size,
        weight.codes_NR.stride(0),
        weight.bits,
        DTYPES[weight.scales_NJ.dtype],
    )
    native.call(
        library,
        "llmctl_quantized_linear",
        DTYPES[x.dtype],
        rows.data_ptr(),
        rows.stride(0),
        ctypes.byref(args),
        None if bias is None else bias.contiguous().data_ptr(),
        out.data_ptr(),
        n_out,
        rows.shape[0],
        weight.n_in,
        n_out,
    )
    return out


def _of_each(weight: QuantizedWeight, values_NJ: torch.Tensor) -> torch.Tensor:
    return values_NJ.repeat_interleave(min(weight.group_size, weight.n_in), 1)[:, : weight.n_in]
