"""Checkpoints of GPTQ tools (AutoGPTQ, GPTQModel, Optimum): `qweight`, `qzeros`, `scales`, `g_idx`.

`qweight` int32 [K bits / 32, N] packs down a column, `qzeros` int32 [J, N bits / 32] along a row. In the first format a
zero point is stored less 1, in "gptq_v2" as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmctl.checkpoint import TensorFiles
from llmctl.errors import UserError
from llmctl.models.packed import AffineWeight
from llmctl.quantize import bits as words
from llmctl.quantize.layouts import parts
from llmctl.quantize.layouts.act_order import by_groups

BITS = (2, 3, 4, 8)


class GptqFiles:
    """Reads such files."""

    def __init__(self, said: Mapping, files: TensorFiles):
        self._files, self._bits = files, parts.number(files, said, "bits")
        self._size = parts.number(files, said, "group_size") or -1
        kind = said.get("checkpoint_format") or "gptq"
        if self._bits not in BITS or kind not in ("gptq", "gptq_v2"):
            raise UserError(
                f"{files.path}: GPTQ with {self._bits} bits in the format {kind!r}; llmctl reads {BITS} bits in gptq "
                "and gptq_v2",
                hint="GPTQModel converts its other formats",
            )
        self._less = 1 if kind == "gptq" else 0
        self._modules = parts.modules_with(files, "qweight", ("qweight", "qzeros", "scales", "g_idx"))

    def modules(self) -> dict[str, list[str]]:
        return self._modules

    def shape(self, module: str) -> tuple[int, int]:
        n_words, n_out = parts.matrix_shape(self._files, module, "qweight")
        return n_out, n_words * words.WORD // self._bits

    def packed(self, module: str) -> AffineWeight:
        bits, (n_out, n_in) = self._bits, self.shape(module)
        size = self._size if self._size > 0 else n_in
        n_groups = -(-n_in // size)
        packed_WN = parts.tensor(self._files, module, "qweight", (None, n_out), (torch.int32,))
        scales_JN = parts.tensor(self._files, module, "scales", (n_groups, n_out))
        shape = (n_groups, words.words_for(n_out, bits))
        zeros_JW = parts.tensor(self._files, module, "qzeros", shape, (torch.int32,))
        zeros_JN = (words.unpack(zeros_JW, bits, n_out) + self._less) & ((1 << bits) - 1)
        weight = AffineWeight(
            words.unpack(packed_WN.mT, bits, n_in),
            parts.is_finite(self._files, f"{module}.scales", scales_JN).mT.contiguous(),
            zeros_JN.mT.contiguous(),
            bits,
            size,
        )
        if "g_idx" not in self._modules[module]:
            return weight
        groups_K = parts.tensor(self._files, module, "g_idx", (n_in,))
        return by_groups(weight, groups_K, f"{self._files.path}: {module}.g_idx")
