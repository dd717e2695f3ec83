"""Words or sentences as points in a plane, where a model's embeddings put them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from llmctl.devices import choose_device
from llmctl.errors import UserError
from llmctl.generation.complete import encode_prompt
from llmctl.models.language_model import LanguageModel
from llmctl.models.loading import load_model
from llmctl.pictures import projection
from llmctl.pictures.settings import EmbeddingMapSettings
from llmctl.tokenizer import Tokenizer

MOST_LINES = 2000
"""Of a map: t-SNE takes their square in time and memory."""


@dataclass(frozen=True)
class EmbeddingMap:
    """`points` [N, 2] of the `labels`; `axes` names the two directions, and `kind` says what was embedded."""

    labels: list[str]
    points: list[tuple[float, float]]
    axes: tuple[str, str]
    kind: str


def embedding_map(path: str | os.PathLike, lines: Sequence[str], settings: EmbeddingMapSettings) -> EmbeddingMap:
    """Embed each line, empty ones left out, and project. Raises UserError where there are too few or too many."""
    lines = [line.strip() for line in lines if line.strip()]
    if not 3 <= len(lines) <= MOST_LINES:
        raise UserError(f"a map of embeddings takes 3 to {MOST_LINES} lines; there are {len(lines)}")
    kind = settings.embeddings
    if kind == "auto":
        kind = "sentences" if any(" " in line for line in lines) else "tokens"
    tokenizer, model = Tokenizer.load(path), load_model(path, device=choose_device(None))
    embed = _word_vector if kind == "tokens" else _sentence_vector
    with torch.inference_mode():
        vectors_ND = torch.stack([embed(model, tokenizer, line).float().cpu() for line in lines])
    if settings.projection == "pca":
        points_N2, shares = projection.pca(vectors_ND)
        axes = tuple(f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    else:
        points_N2, axes = projection.tsne(vectors_ND), ("t-SNE 1", "t-SNE 2")
    return EmbeddingMap(lines, [tuple(point) for point in points_N2.tolist()], axes, kind)


def _word_vector(model: LanguageModel, tokenizer: Tokenizer, word: str) -> torch.Tensor:
    """The mean of the word's rows in the embedding matrix, spelt as it is within a text where that takes fewer tokens."""
    spellings = [tokenizer.encode(text, add_special_tokens=False) for text in (f" {word}", word)]
    ids = min((ids for ids in spellings if ids), key=len)
    return model.embed_tokens.weight[torch.tensor(ids)].float().mean(0)


def _sentence_vector(model: LanguageModel, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """The mean over the tokens of the last hidden state, an encoder's where there is one."""
    ids = encode_prompt(tokenizer, text)
    limit = model.config.max_positions
    if limit is not None and len(ids) > limit:
        raise UserError(f"a line has {len(ids)} tokens; the model's context is {limit}", hint="shorten it")
    ids_1T = torch.tensor([ids], device=model.embed_tokens.weight.device)
    hidden_1TD = model.hidden(ids_1T) if model.config.encoder is None else model.encode(ids_1T).hidden_BSD
    return hidden_1TD[0].float().mean(0)


def read_lines(path: str, standard_input: BinaryIO) -> list[str]:
    """The lines of a UTF-8 file, or of standard input where the path is "-"."""
    data = standard_input.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8") from error
