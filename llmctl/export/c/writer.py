"""The primitive values of model.bin, as run.c reads them: little-endian 32-bit words, texts, rows of weights."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import torch
import torch.nn.functional as F

MAGIC = b"llmctl-c"
VERSION = 1
GROUP = 32
"""int8 weights share a float32 scale in groups of so many along a row; a row is padded with zeros to whole groups."""

ROWS_AT_ONCE = 4096


class Writer:
    """Appends values to a file, in the order in which run.c reads them."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def word(self, *values: int) -> None:
        self.file.write(struct.pack(f"<{len(values)}I", *values))

    def float(self, *values: float) -> None:
        self.file.write(struct.pack(f"<{len(values)}f", *values))

    def double(self, *values: float) -> None:
        self.file.write(struct.pack(f"<{len(values)}d", *values))

    def id(self, value: int | None) -> None:
        """A token's id; None is one that is not there."""
        self.word(0 if value is None else value + 1)

    def ids(self, values: Sequence[int]) -> None:
        self.word(len(values))
        for value in values:
            self.id(value)

    def text(self, data: bytes) -> None:
        self.word(len(data))
        self.file.write(data)

    def triples(self, rows: Iterable[tuple[int, int, int]]) -> None:
        rows = list(rows)
        self.word(len(rows))
        for row in rows:
            self.word(*row)

    def floats(self, tensor: torch.Tensor) -> None:
        self.file.write(memoryview(tensor.detach().float().contiguous().reshape(-1).numpy()).cast("B"))

    def matrix(self, parts: Sequence[torch.Tensor], int8: bool) -> None:
        """Matrices [N, K] that are rows of one: float32, or all rows' codes and then all their scales."""
        if not int8:
            for part in parts:
                for rows in part.split(ROWS_AT_ONCE):
                    self.floats(rows)
            return
        scales = []
        for part in parts:
            for rows in part.split(ROWS_AT_ONCE):
                codes_NK, scales_NJ = quantized(rows)
                self.file.write(memoryview(codes_NK.reshape(-1).numpy()).cast("B"))
                scales.append(scales_NJ)
        for rows in scales:
            self.floats(rows)


def quantized(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [N, padded K] and float32 scales [N, groups]: each group's largest magnitude becomes 127."""
    padded_NK = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % GROUP))
    groups_NJG = padded_NK.unflatten(1, (-1, GROUP))
    scales_NJ1 = groups_NJG.abs().amax(-1, keepdim=True) / 127
    codes_NJG = torch.where(scales_NJ1 > 0, groups_NJG / scales_NJ1, 0.0).round().to(torch.int8)
    return codes_NJG.flatten(1).contiguous(), scales_NJ1.squeeze(-1)
