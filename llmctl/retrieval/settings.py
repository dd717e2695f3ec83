"""What `llmctl index` can be asked to do. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class IndexSettings:
    embed_model: str | None = field(
        default=None,
        metadata={"help": "Give every passage a vector of this model; without it words are counted (BM25).",
                  "type": "path", "metavar": "PATH"},
    )  # fmt: skip
    passage_length: int | None = field(
        default=None,
        metadata={"help": "Characters of a passage at most; a longer line stays whole.", "at_least": 100,
                  "show_default": "as it was built, or 1200"},
    )  # fmt: skip
    rebuild: bool = field(
        default=False, metadata={"help": "Read everything again, whatever was indexed.", "show_default": False}
    )
    query: str | None = field(
        default=None, metadata={"help": "Print the passages for this question as JSON Lines.", "metavar": "TEXT"}
    )
    passages: int = field(default=5, metadata={"help": "Passages for --query.", "at_least": 1})
