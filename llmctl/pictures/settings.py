"""What `llmctl inspect` can be told about pictures of a model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ATTENTION, EMBEDDINGS = "Attention maps", "Maps of embeddings"


@dataclass(frozen=True)
class AttentionSettings:
    attention: str | None = field(
        default=None,
        metadata={
            "help": "Show how much each token of this text attends to each other; by default a map for every layer, the "
            "mean of its heads.",
            "metavar": "TEXT",
            "group": ATTENTION,
        },
    )
    layer: int | None = field(
        default=None, metadata={"help": "All heads of this layer, from 0.", "at_least": 0, "group": ATTENTION}
    )
    head: int | None = field(
        default=None, metadata={"help": "This head only, from 0.", "at_least": 0, "group": ATTENTION}
    )
    mean: bool = field(
        default=False, metadata={"help": "One map: the mean of all that were chosen.", "group": ATTENTION}
    )
    part: Literal["encoder", "decoder", "cross"] = field(
        default="cross",
        metadata={"help": "Of an encoder-decoder: where it attends; cross is from target to text.", "group": ATTENTION},
    )
    target: str | None = field(
        default=None,
        metadata={
            "help": "Of an encoder-decoder: what the decoder reads; by default what it generates.",
            "metavar": "TEXT",
            "group": ATTENTION,
        },
    )


@dataclass(frozen=True)
class EmbeddingMapSettings:
    embedding_map: str | None = field(
        default=None,
        metadata={
            "help": 'Show the lines of this file (- is standard input; also JSON Lines with a "text") as points, near each '
            "other where their embeddings are alike.",
            "metavar": "FILE|-",
            "type": "path",
            "group": EMBEDDINGS,
        },
    )
    embeddings: Literal["auto", "tokens", "sentences"] = field(
        default="auto",
        metadata={
            "help": "tokens: rows of the embedding matrix; sentences: the vectors of `llmctl embed`; auto is tokens where every "
            "line is one word.",
            "group": EMBEDDINGS,
        },
    )
    projection: Literal["pca", "tsne"] = field(
        default="pca",
        metadata={
            "help": "pca keeps the two directions of largest variance, tsne neighbourhoods.",
            "group": EMBEDDINGS,
        },
    )
