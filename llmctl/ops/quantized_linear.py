"""The matrix product with weights of 4 or 8 bits in groups, as `llmctl_quantized_linear` of csrc/llmctl.h takes them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmctl.ops import huge_pages, native
from llmctl.ops.dispatch import DTYPES, cpu_library, cuda_library, cuda_stream, is_inference

PANEL, BLOCK, RUN, QUAD = 16, 128, 32, 4
"""Outputs side by side; weights that share a rounding of x; weights that share a scale at least; weights side by side."""
FEW_ROWS = 32
"""For so many a CUDA device reads the weights but once; for more they are unpacked, and torch multiplies."""
SCALE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""LLMCTL_F32, LLMCTL_BF16 and LLMCTL_F16 of csrc/llmctl.h."""


class Args(ctypes.Structure):
    """llmctl_quantized_weight of csrc/llmctl.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("n_in", "n_out", "unit")),
        *((name, ctypes.c_int32) for name in ("bits", "scales_dtype")),
    ]


@dataclass(frozen=True)
class QuantizedWeight:
    """Weights [N, K] as (code - zero) * scale, laid out for the kernels; made by `quantized_weight`.

    P panels of 16 outputs, B blocks of 128 weights, U units of a block with a scale (and zero) each: codes uint8, two of 4
    bits to a byte. N and K are filled up with codes and scales of 0.
    """

    bits: int
    n_out: int
    n_in: int
    unit: int
    codes_PB: torch.Tensor
    scales_PBU16: torch.Tensor
    zeros_PBU16: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.codes_PB, self.scales_PBU16, self.zeros_PBU16) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def args(self) -> Args:
        """For csrc; good as long as this weight lives."""
        return Args(
            self.codes_PB.data_ptr(),
            self.scales_PBU16.data_ptr(),
            None if self.zeros_PBU16 is None else self.zeros_PBU16.data_ptr(),
            self.n_in,
            self.n_out,
            self.unit,
            self.bits,
            SCALE_DTYPES[self.scales_PBU16.dtype],
        )


def quantized_weight(
    codes_NK: torch.Tensor, scales_NJ: torch.Tensor, zeros_NJ: torch.Tensor | None, bits: int, group_size: int
) -> QuantizedWeight:
    """Lays out codes (uint8 below 2^bits) for the kernels: weight [n, k] is (code - zero) * scale of group k // group_size.

    bits is 4 or 8; group_size a multiple of 32, or at least K: one group a row. Scales are floats, kept in 16 bits where
    these hold them exactly; zeros uint8 of at most 2^bits (None: 2^(bits - 1)); both [N, ceil(K / group_size)]. Raises
    ValueError for anything else.
    """
    n_out, n_in = codes_NK.shape
    if bits not in (4, 8):
        raise ValueError(f"weights of {bits} bits; expected 4 or 8")
    if group_size <= 0 or (group_size % RUN and group_size < n_in):
        raise ValueError(f"groups of {group_size} weights; expected a multiple of {RUN}, or the whole row of {n_in}")
    shape = (n_out, -(-n_in // group_size))
    for name, values in (("scales", scales_NJ), ("zeros", zeros_NJ)):
        if values is not None and values.shape != shape:
            raise ValueError(f"{name} of shape {tuple(values.shape)}; {n_out} rows of {n_in} weights need {shape}")
    _check_bytes("codes", codes_NK, (1 << bits) - 1)
    if zeros_NJ is not None:
        _check_bytes("zeros", zeros_NJ, 1 << bits)
    unit = next(unit for unit in (128, 64, 32) if group_size % unit == 0 or (unit == 128 and group_size >= n_in))
    scales = _units_laid_out(_narrowed(scales_NJ), n_in, group_size, unit)
    zeros = None if zeros_NJ is None else _units_laid_out(zeros_NJ, n_in, group_size, unit)
    return QuantizedWeight(bits, n_out, n_in, unit, _codes_laid_out(codes_NK, bits), scales, zeros)


def unpacked(weight: QuantizedWeight) -> torch.Tensor:
    """The codes again, uint8 [N, K]."""
    return _codes_of(weight, _every_row(weight))


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] weights, rounded once."""
    return _values_of(weight, _every_row(weight)).to(dtype)


def quantized_rows(weight: QuantizedWeight, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rows `ids` [...] of the weights, [..., K]: the lookup of an embedding. Raises IndexError for one there is not."""
    chosen = ids.reshape(-1)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < weight.n_out:
        raise IndexError(f"row {int(chosen.min())} to {int(chosen.max())} of {weight.n_out}")
    return _values_of(weight, chosen).to(dtype).view(*ids.shape, weight.n_in)


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] -> [..., N] in the dtype of x.

    Without a gradient on a CPU the kernel multiplies whole numbers: see `reference`. There a row of the result has the same
    bits whatever the other rows are and how many there are. Otherwise the weights are dequantized to the dtype of x.
    """
    if (device := cuda_library(x, bias)) and weight.codes_PB.device == x.device:
        return on_cuda(device, x, weight, bias)
    library = cpu_library() if is_inference(x, bias) else None
    if library is None:
        return F.linear(x, dequantized(weight, x.dtype).to(x.device), bias)
    out, *operands = _operands(x, weight, bias)
    sizes = x.numel() // weight.n_in, weight.n_in, weight.n_out
    native.call(library, "llmctl_quantized_linear", *operands, *sizes)
    return out


def on_cuda(
    library: ctypes.CDLL, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`quantized_linear` by the CUDA kernels: sums of exact products for few rows, else torch's product with the weights
    rounded to the dtype of x."""
    n_rows = x.numel() // weight.n_in
    if n_rows > FEW_ROWS:
        return F.linear(x, dequantized_on_cuda(library, weight, x.dtype), bias)
    size, packed = ctypes.c_int64(), weight.args()
    native.call(library, "llmctl_cuda_quantized_linear_scratch", ctypes.byref(packed), n_rows, ctypes.byref(size))
    scratch = torch.empty(size.value, dtype=torch.uint8, device=x.device)
    out, *operands = _operands(x, weight, bias)
    rest = n_rows, scratch.data_ptr(), cuda_stream(x)
    native.call(library, "llmctl_cuda_quantized_linear", *operands, *rest)
    return out


def dequantized_on_cuda(library: ctypes.CDLL, weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """`dequantized` by the CUDA kernel."""
    out = torch.empty(weight.n_out, weight.n_in, dtype=dtype, device=weight.codes_PB.device)
    packed = weight.args()
    native.call(
        library, "llmctl_cuda_dequantize", DTYPES[dtype], ctypes.byref(packed), out.data_ptr(), cuda_stream(out)
    )
    return out


def _operands(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> tuple:
    """The result, yet to be filled, and what comes first in a call of a kernel."""
    if x.shape[-1] != weight.n_in:
        raise ValueError(f"x has {x.shape[-1]} columns, the weights {weight.n_in}")
    rows = x.reshape(-1, weight.n_in)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.n_out)
    bias = None if bias is None else bias.contiguous()
    return (
        out,
        DTYPES[x.dtype],
        rows.data_ptr(),
        rows.stride(0),
        ctypes.byref(weight.args()),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        weight.n_out,
    )


def reference(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The specification: each 128 elements of a row of x in whole numbers of 8 bits and a scale, then sums
    without further rounding. A row with NaN or infinity gives NaN."""
    blocks = F.pad(x.float(), (0, -weight.n_in % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    levels = torch.tensor(127.0)
    factor = torch.where(largest > 1e-30, levels / largest, 0.0)
    rounded = ((blocks * factor).round().double() * (largest / levels)).flatten(-2)[..., : weight.n_in]
    rounded = torch.where(x.isfinite().all(-1, keepdim=True), rounded, torch.nan)
    return F.linear(rounded, dequantized(weight, torch.float64), None if bias is None else bias.double()).to(x.dtype)


def _every_row(weight: QuantizedWeight) -> torch.Tensor:
    return torch.arange(weight.n_out, device=weight.codes_PB.device)


def _values_of(weight: QuantizedWeight, ids: torch.Tensor) -> torch.Tensor:
    """float32 [len(ids), K]"""
    zeros = 1 << (weight.bits - 1) if weight.zeros_PBU16 is None else _of_each(weight, weight.zeros_PBU16, ids)
    return (_codes_of(weight, ids).float() - zeros) * _of_each(weight, weight.scales_PBU16, ids)


def _check_bytes(name: str, values: torch.Tensor, largest: int) -> None:
    if values.dtype != torch.uint8 or (values.numel() and int(values.max()) > largest):
        raise ValueError(f"{name} of {values.dtype}; expected uint8 of at most {largest}")


def _narrowed(scales: torch.Tensor) -> torch.Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.to(scales.dtype), scales):
            return narrow
    return scales.float()


def _filled(values_NX: torch.Tensor, columns: int) -> torch.Tensor:
    """[P, 16, columns], with 0 behind the last row and column."""
    n_rows, n_columns = values_NX.shape
    return F.pad(values_NX, (0, columns - n_columns, 0, -n_rows % PANEL)).view(-1, PANEL, columns)


def _codes_laid_out(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    n_blocks = -(-codes_NK.shape[1] // BLOCK)
    quads = _filled(codes_NK, n_blocks * BLOCK).unflatten(2, (n_blocks, BLOCK // RUN, RUN // QUAD, QUAD))
    codes = quads.permute(0, 2, 3, 4, 1, 5)  # panel, block, run, quad, output, weight
    if bits == 4:
        lower, upper = codes.unflatten(3, (2, -1)).unbind(3)
        codes = lower | (upper << 4)
    return huge_pages.contiguous(codes).flatten(2)


def _codes_of(weight: QuantizedWeight, ids: torch.Tensor) -> torch.Tensor:
    """uint8 [len(ids), K]"""
    n_panels, n_blocks, _ = weight.codes_PB.shape
    stored = weight.codes_PB.view(n_panels, n_blocks, BLOCK // RUN, -1, PANEL, QUAD)
    codes = stored[ids // PANEL, :, :, :, ids % PANEL]  # output, block, run, quad, weight
    if weight.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], 3)
    return codes.flatten(1)[:, : weight.n_in]


def _units_laid_out(values_NJ: torch.Tensor, n_in: int, group_size: int, unit: int) -> torch.Tensor:
    n_blocks = -(-n_in // BLOCK)
    groups = torch.arange(0, n_in, unit) // group_size
    values = _filled(values_NJ[:, groups], n_blocks * (BLOCK // unit))
    return huge_pages.contiguous(values.unflatten(2, (n_blocks, BLOCK // unit)).permute(0, 2, 3, 1))


def _of_each(weight: QuantizedWeight, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 [len(ids), K] of a scale or zero for each unit."""
    chosen = values[ids // PANEL, :, :, ids % PANEL].float()
    return chosen.flatten(1).repeat_interleave(weight.unit, 1)[:, : weight.n_in]
