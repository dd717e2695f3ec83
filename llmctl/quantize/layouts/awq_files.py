"""Checkpoints of AutoAWQ in its "gemm" form: `qweight` int32 [K, N / 8], `qzeros` int32 [J, N / 8], `scales` [J, N].

A word holds eight rows' codes in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmctl.checkpoint import TensorFiles
from llmctl.errors import UserError
from llmctl.models.packed import AffineWeight
from llmctl.quantize import bits as words
from llmctl.quantize.layouts import parts

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqFiles:
    """Reads such files."""

    def __init__(self, said: Mapping, files: TensorFiles):
        sizes, widths = (
            [parts.number(files, said, key) for key in keys]
            for keys in (("group_size", "q_group_size"), ("bits", "w_bit"))
        )
        self._files, self._size = files, sizes[0] or sizes[1] or -1
        bits, version = widths[0] or widths[1], str(said.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise UserError(
                f"{files.path}: AWQ with {bits} bits in the version {version!r}; llmctl reads 4 bits in gemm",
                hint="AutoAWQ writes it with version='GEMM'",
            )
        self._modules = parts.modules_with(files, "qweight", ("qweight", "qzeros", "scales"))

    def modules(self) -> dict[str, list[str]]:
        return self._modules

    def shape(self, module: str) -> tuple[int, int]:
        n_in, n_words = parts.matrix_shape(self._files, module, "qweight")
        return n_words * 8, n_in

    def packed(self, module: str) -> AffineWeight:
        n_out, n_in = self.shape(module)
        size = self._size if self._size > 0 else n_in
        n_groups = -(-n_in // size)
        packed_KW = parts.tensor(self._files, module, "qweight", (n_in, None), (torch.int32,))
        zeros_JW = parts.tensor(self._files, module, "qzeros", (n_groups, n_out // 8), (torch.int32,))
        scales_JN = parts.tensor(self._files, module, "scales", (n_groups, n_out))
        return AffineWeight(
            _rows(packed_KW, n_out).mT.contiguous(),
            parts.is_finite(self._files, f"{module}.scales", scales_JN).mT.contiguous(),
            _rows(zeros_JW, n_out).mT.contiguous(),
            4,
            size,
        )


def _rows(packed: torch.Tensor, n_out: int) -> torch.Tensor:
    """uint8 [.., N] in the rows' own order: the code in place p of a word belongs to row `_ORDER[p]` of its eight."""
    codes = words.unpack(packed, 4, n_out).view(len(packed), -1, 8)
    ordered = torch.empty_like(codes)
    ordered[..., list(_ORDER)] = codes
    return ordered.flatten(1)
