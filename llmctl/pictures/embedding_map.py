"""Words or sentences as points in a plane, where a model's embeddings put them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import islice

import torch

from llmctl.data.text_rows import read_rows
from llmctl.embedding.embedder import Embedder
from llmctl.embedding.settings import EmbedSettings
from llmctl.errors import UserError
from llmctl.models.language_model import LanguageModel
from llmctl.pictures import projection
from llmctl.pictures.settings import EmbeddingMapSettings
from llmctl.tokenizer import Tokenizer

MOST_TEXTS = 2000
"""Of a map: t-SNE takes their square in time and memory."""


@dataclass(frozen=True)
class EmbeddingMap:
    """`points` [N, 2] of the `labels`; `axes` names the two directions, and `kind` says what was embedded."""

    labels: list[str]
    points: list[tuple[float, float]]
    axes: tuple[str, str]
    kind: str


def embedding_map(path: str | os.PathLike, source: str, settings: EmbeddingMapSettings) -> EmbeddingMap:
    """Embed the texts of a file ("-" is standard input) as `llmctl embed` reads it, and project.

    Raises UserError where there are too few or too many, or one cannot be read.
    """
    rows = [row for row in islice(read_rows([source]), MOST_TEXTS + 1) if row.text.strip()]
    if not 3 <= len(rows) <= MOST_TEXTS:
        raise UserError(f"{source}: a map of embeddings takes 3 to {MOST_TEXTS} texts; there are {len(rows)}")
    kind = settings.embeddings
    if kind == "auto":
        kind = "sentences" if any(" " in row.text.strip() for row in rows) else "tokens"
    embedder = Embedder.open(path, EmbedSettings())
    if kind == "tokens":
        vectors_ND = torch.stack([_word_vector(embedder.model, embedder.tokenizer, row.text.strip()) for row in rows])
    else:
        vectors_ND = torch.stack([torch.from_numpy(vector) for _, vector in embedder.embed(rows)])
    if settings.projection == "pca":
        points_N2, shares = projection.pca(vectors_ND)
        axes = tuple(f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    else:
        points_N2, axes = projection.tsne(vectors_ND), ("t-SNE 1", "t-SNE 2")
    return EmbeddingMap([row.text.strip() for row in rows], [tuple(p) for p in points_N2.tolist()], axes, kind)


def _word_vector(model: LanguageModel, tokenizer: Tokenizer, word: str) -> torch.Tensor:
    """The mean of the word's rows in the embedding matrix, spelt as it is within a text where that takes fewer tokens."""
    spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (f" {word}", word)]
    ids = min((ids for ids in spellings if ids), key=len, default=None)
    if ids is None:
        raise UserError(f"{word!r} has no tokens in this tokenizer, and so no place on the map")
    return model.embed_tokens.weight[torch.tensor(ids)].detach().float().mean(0).cpu()
