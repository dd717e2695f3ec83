"""Matrices in few bits, as a checkpoint's file brings them and as a layer holds them.

Every kind has `shape` (out, in), `dequantized(dtype)`, `part(first, last)` of its rows, and `to(device)`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from llmctl.ops import quantized_linear as ops

KERNEL_MULTIPLE = 32
"""Group sizes of the kernel are multiples of this, or a whole row."""


class _Packed:
    def _mapped(self, change) -> _Packed:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: change(value) for name, value in fields.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device | str) -> _Packed:
        return self._mapped(lambda tensor: tensor.to(device))

    @property
    def nbytes(self) -> int:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class AffineWeight(_Packed):
    """(code - zero) * scale: `codes_NK` uint8 below 2^bits, `scales_NJ` floating, `zeros_NJ` uint8 (None: 2^(bits-1)).

    Column k of the codes belongs to group k // group_size, and to input `columns_K[k]` (None: k).
    """

    codes_NK: torch.Tensor
    scales_NJ: torch.Tensor
    zeros_NJ: torch.Tensor | None
    bits: int
    group_size: int
    columns_K: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes_NK.shape)

    def part(self, first: int, last: int) -> AffineWeight:
        zeros = None if self.zeros_NJ is None else self.zeros_NJ[first:last]
        return dataclasses.replace(
            self, codes_NK=self.codes_NK[first:last], scales_NJ=self.scales_NJ[first:last], zeros_NJ=zeros
        )

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        middle = 1 << (self.bits - 1)
        zeros = middle if self.zeros_NJ is None else self._of_columns(self.zeros_NJ.float())
        weight_NK = ((self.codes_NK.float() - zeros) * self._of_columns(self.scales_NJ.float())).to(dtype)
        return in_order(weight_NK, self.columns_K)

    def _of_columns(self, values_NJ: torch.Tensor) -> torch.Tensor:
        return values_NJ.repeat_interleave(self.group_size, 1)[:, : self.codes_NK.shape[1]]

    def kernel_weight(self) -> ops.QuantizedWeight | None:
        """What the kernel multiplies by (in the order of `columns_K`); None for group sizes that it does not take."""
        n_in = self.codes_NK.shape[1]
        if self.group_size % KERNEL_MULTIPLE and self.group_size < n_in:
            return None
        bits, zeros = self.bits, self.zeros_NJ
        if bits not in (4, 8):
            zeros = torch.full_like(self.scales_NJ, 1 << (bits - 1), dtype=torch.uint8) if zeros is None else zeros
            bits = 4 if bits < 4 else 8
        return ops.quantized_weight(self.codes_NK, self.scales_NJ.contiguous(), zeros, bits, self.group_size)


@dataclass(frozen=True)
class LaidOutWeight:
    """What the kernel multiplies by, whose inputs are `x[..., columns_K]` (None: x)."""

    quantized: ops.QuantizedWeight
    columns_K: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.quantized.n_out, self.quantized.n_in


@dataclass(frozen=True)
class TableWeight(_Packed):
    """table[code] * scale over blocks of the flattened matrix (nf4, fp4): two codes to a byte, the first one high.

    `bytes_M` uint8, `table_16` float32, `scales_B` float32 (one for `block_size` weights).
    """

    bytes_M: torch.Tensor
    table_16: torch.Tensor
    scales_B: torch.Tensor
    block_size: int
    shape: tuple[int, int]

    def part(self, first: int, last: int) -> TableWeight | PlainWeight:
        n_in = self.shape[1]
        if (first * n_in) % self.block_size or (last * n_in) % self.block_size:
            return PlainWeight(self.dequantized(torch.float32)[first:last])
        return TableWeight(
            self.bytes_M[first * n_in // 2 : last * n_in // 2],
            self.table_16,
            self.scales_B[first * n_in // self.block_size : last * n_in // self.block_size],
            self.block_size,
            (last - first, n_in),
        )

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        count = self.shape[0] * self.shape[1]
        pairs_256_2 = torch.cartesian_prod(self.table_16, self.table_16)  # a lookup of two weights at once
        values = pairs_256_2[self.bytes_M.int()].flatten()[:count]
        scaled = torch.nn.functional.pad(values, (0, -count % self.block_size)).view(-1, self.block_size)
        return (scaled * self.scales_B[:, None]).flatten()[:count].view(self.shape).to(dtype)


@dataclass(frozen=True)
class FloatWeight(_Packed):
    """Values in 8-bit floating point [N, K] times scales that are one for a row [N, 1], for all [1, 1], or for blocks."""

    values_NK: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values_NK.shape)

    def part(self, first: int, last: int) -> FloatWeight | PlainWeight:
        if self.scales.shape[0] not in (1, len(self.values_NK)):
            return PlainWeight(self.dequantized(torch.float32)[first:last])
        scales = self.scales if self.scales.shape[0] == 1 else self.scales[first:last]
        return FloatWeight(self.values_NK[first:last], scales)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        scales, (n_out, n_in) = self.scales.float(), self.shape
        if scales.shape[0] not in (1, n_out) or scales.shape[1] not in (1, n_in):
            rows, columns = (-(-size // count) for size, count in zip(self.shape, scales.shape))
            scales = scales.repeat_interleave(rows, 0)[:n_out].repeat_interleave(columns, 1)[:, :n_in]
        return (self.values_NK.float() * scales).to(dtype)


@dataclass(frozen=True)
class PlainWeight(_Packed):
    """Rows of a packed matrix that cannot be cut out of it without unpacking."""

    values_NK: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values_NK.shape)

    def part(self, first: int, last: int) -> PlainWeight:
        return PlainWeight(self.values_NK[first:last])

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values_NK.to(dtype)


PackedWeight = AffineWeight | TableWeight | FloatWeight | PlainWeight


def in_order(weight_NK: torch.Tensor, columns_K: torch.Tensor | None) -> torch.Tensor:
    """The matrix by its inputs' own numbers, of one whose column k is that of input `columns_K[k]`."""
    return weight_NK if columns_K is None else weight_NK[:, columns_K.argsort()]
