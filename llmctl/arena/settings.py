"""What `llmctl arena` can be asked to do. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.model_settings import EngineSettings, flag


@dataclass(frozen=True)
class ArenaSettings(EngineSettings):
    prompts: str | None = flag(
        None, "Questions: one in each line, or JSON Lines with prompt or messages.", type="path", metavar="FILE"
    )
    votes: str = flag("votes.jsonl", "Where votes are kept, one in each line.", type="output", metavar="FILE")
    table: bool = flag(False, "Give the ratings that the votes come to.", show_default=False)
    bootstrap: int = flag(1000, "Resamplings of the votes for the intervals.", type="count", at_least=1)
