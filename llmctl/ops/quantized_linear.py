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

    @property
    def n_out(self) -> int:
        return self.codes_NR.shape[0]


def quantized_weight(
    codes_NK: torch.Tensor, scales_NJ: torch.Tensor, zeros_NJ: torch.Tensor | None, bits: int, group_size: int
) -> QuantizedWeight:
    """Lays out codes (uint8 below 2^bits) for the kernels: weight [n, k] is (code - zero) * scale of group k // group_size.

    bits is 4 or 8; group_size a multiple of 32, or at least K: one group a row. Scales are float32, bfloat16 or float16,
    zeros uint8 (None: 2^(bits - 1)), both [N, ceil(K / group_size)]. Raises ValueError for anything else.
    """
    n_out, n_in = codes_NK.shape
    if bits not in (4, 8):
        raise ValueError(f"weights of {bits} bits; expected 4 or 8")
    if group_size <= 0 or (group_size % 32 and group_size < n_in):
        raise ValueError(f"groups of {group_size} weights; expected a multiple of 32, or the whole row of {n_in}")
    shape = (n_out, -(-n_in // group_size))
    for name, values in (("scales", scales_NJ), ("zeros", zeros_NJ)):
        if values is not None and values.shape != shape:
            raise ValueError(f"{name} of shape {tuple(values.shape)}; {n_out} rows of {n_in} weights need {shape}")
    if codes_NK.dtype != torch.uint8 or (codes_NK.numel() and int(codes_NK.max()) >> bits):
        raise ValueError(f"codes of {codes_NK.dtype}; expected uint8 below {1 << bits}")
    scales_NJ = scales_NJ if scales_NJ.dtype in DTYPES else scales_NJ.float()
    zeros_NJ = None if zeros_NJ is None else zeros_NJ.to(torch.uint8).contiguous()
    return QuantizedWeight(bits, group_size, n_in, packed(codes_NK, bits), scales_NJ.contiguous(), zeros_NJ)


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


def quantized_rows(weight: QuantizedWeight, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rows `ids` [...] of the weights, [..., K]: the lookup of an embedding."""
    chosen = ids.reshape(-1)
    zeros_NJ = None if weight.zeros_NJ is None else weight.zeros_NJ[chosen]
    rows = QuantizedWeight(
        weight.bits, weight.group_size, weight.n_in, weight.codes_NR[chosen], weight.scales_NJ[chosen], zeros_NJ
    )
    return dequantized(rows, dtype).view(*ids.shape, weight.n_in)


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] -> [..., N] in the dtype of x. A row has the same bits in any batch where the kernel runs: CPU, no gradient."""
    library = cpu_library() if is_inference(x, bias) else None
    if library is None:
        return F.linear(x, dequantized(weight, x.dtype), bias)
    n_out = weight.n_out
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
