"""What one matrix becomes: plain values that name a form of storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "fp8", "nf4", "fp4", "llm-int8"]

TABLE_BLOCK = 64
"""Weights to one scale of nf4 and fp4."""


@dataclass(frozen=True)
class Scheme:
    """`group_size` weights of a row share a scale (None: all of it); "int" has `bits` and zero points unless `symmetric`.

    `double` keeps the scales of nf4 and fp4 in 8 bits; those of the others have `scale_bits`.
    """

    kind: Kind
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    double: bool = True
    scale_bits: int = 16

    def size(self, n_in: int) -> int:
        return n_in if self.group_size is None else self.group_size

    def bits_per_weight(self, n_in: int) -> float:
        """What is stored of a matrix with rows of `n_in` weights, over their number."""
        if self.kind in ("nf4", "fp4"):
            return 4 + (8 / TABLE_BLOCK if self.double else 32 / TABLE_BLOCK)
        scale = self.scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + scale / self.size(n_in)


FORMATS: dict[str, Scheme] = {
    "int8": Scheme("int", 8),
    "int4": Scheme("int", 4, 64),
    "fp8": Scheme("fp8", 8),
    "nf4": Scheme("nf4", 4),
    "fp4": Scheme("fp4", 4),
    "llm-int8": Scheme("llm-int8", 8, scale_bits=32),
}
PLAIN = ("float32", "bfloat16", "float16")
"""Formats that take quantization back."""
