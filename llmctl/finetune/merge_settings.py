"""What `llmctl merge-lora` can be told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _flag(default, help_: str, **metadata):
    return field(default=default, metadata={"help": help_, **metadata})


@dataclass(frozen=True)
class MergeSettings:
    weights: str | None = _flag(None, "How often each adapter counts; 1 each by default.", metavar="W,W,...")
    method: Literal["linear", "ties", "dare", "svd"] = _flag(
        "linear",
        "How changes of one matrix become one: their sum; what agrees in sign after trimming (ties); their sum with "
        "entries dropped at random (dare); their sum cut to --rank (svd).",
    )
    density: float = _flag(0.5, "Share of a change's entries that ties and dare keep.", above=0, at_most=1)
    rank: int = _flag(16, "Rank that svd leaves.", at_least=1)
    seed: int = _flag(0, "Of dare's choice.")
    tolerance: float = _flag(
        0.01, "Largest mean KL divergence, in nats, between base with adapters and the result.", at_least=0
    )
    unmerge: bool = _flag(False, "Take a merged adapter out of MODEL again.")
    force: bool = _flag(False, "Merge also into a base that the adapter was not trained on.")
    overwrite: bool = _flag(False, "Replace an output that exists.")
