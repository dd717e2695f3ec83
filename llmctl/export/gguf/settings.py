"""What `llmctl export-gguf` can be told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _flag(default, help_: str, **metadata):
    return field(default=default, metadata={"help": help_, **metadata})


@dataclass(frozen=True)
class ExportGgufSettings:
    type: Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_0", "q4_k", "q4_1", "q4_0"] = _flag(
        "f16", "How matrices are stored. q4_k keeps the head and some matrices in 6 bits, as Q4_K_M does."
    )
    name: str | None = _flag(
        None, "The model's name in the file; by default that of MODEL's directory.", metavar="TEXT"
    )
    tolerance: float | None = _flag(
        None,
        "Largest mean KL divergence, in nats, between MODEL and the file as it is read back.",
        show_default="0.001 of 16 bits and more, 0.02 of 6 and 8, 0.3 of fewer",
        at_least=0,
    )
    overwrite: bool = _flag(False, "Replace an output that exists.")

    @property
    def largest_divergence(self) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return {"f": 0.001, "b": 0.001, "q8": 0.02, "q6": 0.02}.get(self.type[: 2 if self.type[0] == "q" else 1], 0.3)
