"""Weights of 4 or 8 bits in groups along their inputs, as com.microsoft's MatMulNBits takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmctl.tensor_file import LazyTensor


@dataclass(frozen=True)
class Groups:
    """A matrix [N, K] in codes: uint8 [N, groups, bytes of a group], `scales` [N, groups], and `zeros` uint8 [N, bytes of a
    row's] (None: the middle of the range). Code k of a row belongs to input `columns_K[k]` (None: k)."""

    bits: int
    group_size: int
    shape: tuple[int, int]
    scales: LazyTensor
    codes: LazyTensor
    zeros: LazyTensor | None = None
    columns_K: torch.Tensor | None = None


@dataclass(frozen=True)
class Quantization:
    """How to round the weights of linear layers to nearest."""

    bits: int
    group_size: int = 32

    def of(self, tensor_NK: LazyTensor) -> Groups:
        n_out, n_in = tensor_NK.shape
        n_groups = -(-n_in // self.group_size)
        kept: list[torch.Tensor] = []

        def scales() -> torch.Tensor:
            codes_NJG, scales_NJ = rounded(tensor_NK.load().float(), self.bits, self.group_size)
            kept.append(packed(codes_NJG, self.bits))
            return scales_NJ.to(tensor_NK.dtype)

        def codes() -> torch.Tensor:
            """Written right behind the scales, from the same pass over the weights."""
            if not kept:
                scales()
            return kept.pop()

        shape = (n_out, n_groups, self.group_size * self.bits // 8)
        stored = LazyTensor((n_out, n_groups), tensor_NK.dtype, scales), LazyTensor(shape, torch.uint8, codes)
        return Groups(self.bits, self.group_size, (n_out, n_in), *stored)


def rounded(weight_NK: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, groups, group_size], scales float32 [N, groups]); a weight is (code - 2^(bits - 1)) * scale.

    The number of largest size in a group becomes the lowest code, which has no positive counterpart: so the whole range of
    codes is used. What fills up the last group is 0.
    """
    middle = 1 << (bits - 1)
    groups_NJG = F.pad(weight_NK, (0, -weight_NK.shape[1] % group_size)).unflatten(1, (-1, group_size))
    largest_NJ1 = groups_NJG.gather(2, groups_NJG.abs().argmax(2, keepdim=True))
    scales_NJ1 = largest_NJ1 / -middle
    inverse_NJ1 = torch.where(scales_NJ1 == 0, 0.0, 1.0 / scales_NJ1)
    codes_NJG = (groups_NJG * inverse_NJ1).round_().add_(middle).clamp_(0, 2 * middle - 1)
    return codes_NJG.to(torch.uint8), scales_NJ1.squeeze(2)


def packed(codes_NJG: torch.Tensor, bits: int) -> torch.Tensor:
    """Two codes of 4 bits to a byte, the first of them below."""
    return codes_NJG if bits == 8 else codes_NJG[..., 0::2] | codes_NJG[..., 1::2] << 4


def restored(codes_NJG: torch.Tensor, scales_NJ: torch.Tensor, n_in: int, bits: int) -> torch.Tensor:
    """Weights [N, K] again, float32."""
    values = (codes_NJG.float() - (1 << (bits - 1))) * scales_NJ.float().unsqueeze(2)
    return values.flatten(1)[:, :n_in]
