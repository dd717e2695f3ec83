"""Encode many documents into one array."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tokenizers

from llmctl.errors import UserError

# Characters given to the library at once: its encodings are large, so they live for a batch only.
BATCH = 1 << 22


class LibraryEncoder:
    """Any tokenizer, through the `tokenizers` library and its own threads."""

    def __init__(self, json_text: str, front: list[int], back: list[int]):
        self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._front = np.array(front, np.uint32)
        self._back = np.array(back, np.uint32)

    def encode(self, texts: list[str], threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        """ids uint32 [n_tokens], offsets int64 [n_documents + 1]; `threads` is the library's own choice."""
        parts, lengths = [], [0]
        for batch in _batches(texts):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids = np.array(encoding.ids, np.uint32)
                parts += [self._front, ids, self._back]
                lengths.append(len(self._front) + len(ids) + len(self._back))
        ids = np.concatenate(parts) if parts else np.empty(0, np.uint32)
        return ids, np.cumsum(lengths, dtype=np.int64)


def encoder_for(json_text: str, spec: dict, front: list[int], back: list[int]) -> LibraryEncoder:
    """The fastest encoder that gives this tokenizer's ids; `front` and `back` stand around every document."""
    return LibraryEncoder(json_text, front, back)


def check_text(texts: list[str]) -> None:
    """Raise for a document that is no text: another type, or lone surrogates, which no UTF-8 can hold."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"document {number} is {type(text).__name__}, expected str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"document {number} holds a lone surrogate at character {error.start}") from error


def _batches(texts: list[str]) -> Iterator[list[str]]:
    check_text(texts)
    start = size = 0
    for position, text in enumerate(texts):
        size += len(text)
        if size >= BATCH:
            yield texts[start : position + 1]
            start, size = position + 1, 0
    if start < len(texts):
        yield texts[start:]
