"""How texts are spoilt for an encoder-decoder to restore. No torch or numpy here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

GROUP = "Restoring spoilt texts (seq2seq)"


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, "group": GROUP, **metadata})


@dataclass(frozen=True)
class CorruptionSettings:
    corruption: Literal["auto", "spans", "infilling"] = _flag(
        "auto",
        "spans: T5's, the target is what sentinels <extra_id_0>, ... stand for; infilling: BART's, the target is the whole "
        "text behind its masks. auto: what the tokenizer has the tokens for.",
    )
    noise_density: float | None = _flag(
        None,
        "Share of the tokens that are taken out.",
        show_default="0.15 for spans, 0.3 for infilling",
        above=0,
        at_most=0.9,
    )
    mean_span_length: float = _flag(3.0, "Tokens taken out in one piece, on average.", at_least=1)
    permute_sentences: bool = _flag(False, "With infilling, also shuffle the sentences of each text.")
