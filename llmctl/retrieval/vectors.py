"""Vectors of passages and questions by an embedding model, and which model that is."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence

import numpy as np

from llmctl.data.text_rows import TextRow
from llmctl.embedding.embedder import Embedder
from llmctl.embedding.settings import EmbedSettings
from llmctl.errors import UserError
from llmctl.lineage import weights_sha256

log = logging.getLogger("llmctl")


@functools.lru_cache(maxsize=8)
def identity(path: str | os.PathLike) -> str:
    """Of a checkpoint's weights: the same model under another path is the same."""
    try:
        return weights_sha256(path)[:16]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


class Vectorizer:
    """Vectors of length 1, so that a product is a cosine; texts beyond the model's context are cut for it."""

    def __init__(self, path: str | os.PathLike):
        self._embedder = Embedder.open(path, EmbedSettings(normalize=True, on_long="truncate"))

    def vectors(self, texts: Sequence[str], report: Callable[[int, str], None] = lambda n, note: None) -> np.ndarray:
        """float32 [N, D]; `report` gets the number of those done. What the model does not read of them is said."""
        before = self._embedder.n_cut
        rows = [TextRow(text, f"passage {number}", {}) for number, text in enumerate(texts, 1)]
        vectors_ND = np.zeros((len(rows), self._embedder.width), np.float32)
        for place, (_, vector) in enumerate(self._embedder.embed(rows)):
            vectors_ND[place] = vector
            report(place + 1, f"of {len(rows)} embedded")
        if n_cut := self._embedder.n_cut - before:
            log.warning(
                "%d of %d texts are longer than the embedding model reads; their ends are not in their vectors"
                " (llmctl index --passage-length makes shorter passages)", n_cut, len(rows),
            )  # fmt: skip
        return vectors_ND
