"""What `llmctl arena` can be asked to do. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmctl.model_settings import flag


@dataclass(frozen=True)
class ArenaSettings:
    prompts: str | None = flag(
        None, "Questions: one in each line, or JSON Lines with prompt or messages.", type="path", metavar="FILE"
    )
    votes: str = flag("votes.jsonl", "Where votes are kept, one in each line.", type="output", metavar="FILE")
    table: bool = flag(False, "Give the ratings that the votes come to.", show_default=False)
    bootstrap: int = flag(1000, "Resamplings of the votes for the intervals.", type="count", at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "Weights and cache; auto is as stored.")
    device: str | None = flag(None, "cpu, cuda, cuda:1.", show_default="a GPU where there is one", metavar="NAME")
