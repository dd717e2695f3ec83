"""What `llmctl export-c` can be told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _flag(default, help_: str, **metadata):
    return field(default=default, metadata={"help": help_, **metadata})


@dataclass(frozen=True)
class ExportCSettings:
    type: Literal["f32", "int8"] = _flag(
        "f32", "Weights as they are, or with 8 bits in groups of 32: a quarter of the size, and faster."
    )
    tolerance: float = _flag(
        0.05, "Largest mean KL divergence, in nats, between MODEL and the compiled program.", at_least=0
    )
    overwrite: bool = _flag(False, "Replace an output that exists.")
