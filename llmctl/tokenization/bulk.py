"""Encode many documents into one array."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers.normalizers import NFC

from llmctl.errors import UserError
from llmctl.ops import bpe, native
from llmctl.tokenization import byte_level

# Characters given to the library at once: its encodings are large, so they live for a batch only.
BATCH = 1 << 22


class LibraryEncoder:
    """Any tokenizer, through the `tokenizers` library and its own threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, front: list[int], back: list[int]):
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
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


class NativeEncoder:
    """A byte-level BPE that csrc knows, on native threads."""

    def __init__(self, encoder: bpe.BpeEncoder, added: list[str], normalizes: bool, front: list[int], back: list[int]):
        self._encoder = encoder
        self._normalize = NFC().normalize_str if normalizes else None
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        self._front = np.array(front, np.uint32)
        self._back = np.array(back, np.uint32)

    def encode(self, texts: list[str], threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        """ids uint32 [n_tokens], offsets int64 [n_documents + 1]; by default as many threads as this process has cores."""
        if self._normalize:
            texts = [text if text.isascii() else self._normalized(text) for text in texts]
        return self._encoder.encode(_utf8(texts), self._front, self._back, threads or available_cores())

    def _normalized(self, text: str) -> str:
        """`text` in NFC, except for the added tokens in it, which are found in the text as written."""
        if not self._added:
            return self._normalize(text)
        parts = self._added.split(text)
        parts[::2] = map(self._normalize, parts[::2])
        return "".join(parts)


def encoder_for(tokenizer: tokenizers.Tokenizer, front: list[int], back: list[int]) -> LibraryEncoder | NativeEncoder:
    """The fastest encoder that gives this tokenizer's ids; `front` and `back` stand around every document."""
    library = native.library()
    # What the library made of the file, not the file: it fills in defaults, and numbers added tokens by itself.
    spec = json.loads(tokenizer.to_str())
    model = byte_level.native_model(spec) if library else None
    if model is None:
        return LibraryEncoder(tokenizer, front, back)
    added = [token.decode() for token in model.tokens]
    return NativeEncoder(bpe.BpeEncoder(library, model), added, byte_level.normalizes(spec), front, back)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _utf8(texts: list[str]) -> list[bytes]:
    """UTF-8 of documents; raises UserError for lone surrogates, which it cannot hold."""
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        number = next(number for number, text in enumerate(texts) if text is error.object)
        raise UserError(f"document {number} holds a lone surrogate at character {error.start}") from error


def _batches(texts: list[str]) -> Iterator[list[str]]:
    _utf8(texts)
    start = size = 0
    for position, text in enumerate(texts):
        size += len(text)
        if size >= BATCH:
            yield texts[start : position + 1]
            start, size = position + 1, 0
    if start < len(texts):
        yield texts[start:]
