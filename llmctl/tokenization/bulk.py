"""Encode many documents into one array."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers.normalizers import NFC

from llmctl.errors import UserError
from llmctl.ops import bpe, native
from llmctl.tokenization import byte_level

# Bytes given to the library at once: its encodings are large, so they live for a batch only.
BATCH = 1 << 22


class LibraryEncoder:
    """Any tokenizer, through the `tokenizers` library and its own threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, front: list[int], back: list[int]):
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._front = np.array(front, np.uint32)
        self._back = np.array(back, np.uint32)

    def encode(self, texts: list[bytes], threads: int | None) -> tuple[np.ndarray, np.ndarray]:
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

    def __init__(self, encoder: bpe.BpeEncoder, front: list[int], back: list[int], adds_space: bool = False):
        self._encoder = encoder
        self._adds_space = adds_space
        self._front = np.array(front, np.uint32)
        self._back = np.array(back, np.uint32)

    def encode(self, texts: list[bytes], threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        """ids uint32 [n_tokens], offsets int64 [n_documents + 1]; by default on every core of this process."""
        if self._adds_space:
            texts = [b" " + text if text and text[:1] != b" " else text for text in texts]
        return self._encoder.encode(texts, self._front, self._back, threads or available_cores())


class NormalizingEncoder:
    """A native encoder of a tokenizer that brings text to NFC first.

    Where added tokens are found in the text as it was written, a document that NFC changes goes to the library, so that
    what stands beside such a token is never joined with it.
    """

    def __init__(self, native_encoder: NativeEncoder, library_encoder: LibraryEncoder, finds_tokens_first: bool):
        self._native = native_encoder
        self._library = library_encoder
        self._finds_tokens_first = finds_tokens_first
        self._normalize = NFC().normalize_str

    def encode(self, texts: list[bytes], threads: int | None) -> tuple[np.ndarray, np.ndarray]:
        """ids uint32 [n_tokens], offsets int64 [n_documents + 1]; by default on every core of this process."""
        normal = [text if text.isascii() else self._normalize(text.decode()).encode() for text in texts]
        ids, offsets = self._native.encode(normal, threads)
        changed = [row for row, text in enumerate(texts) if normal[row] != text]
        if not (changed and self._finds_tokens_first):
            return ids, offsets
        return _with_rows(ids, offsets, changed, *self._library.encode([texts[row] for row in changed], threads))


def _with_rows(
    ids: np.ndarray, offsets: np.ndarray, rows: list[int], row_ids: np.ndarray, row_offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The documents with those in `rows` replaced by other ones."""
    lengths = np.diff(offsets)
    lengths[rows] = np.diff(row_offsets)
    parts, start = [], 0
    for number, row in enumerate(rows):
        parts += [ids[start : offsets[row]], row_ids[row_offsets[number] : row_offsets[number + 1]]]
        start = offsets[row + 1]
    return np.concatenate([*parts, ids[start:]]), np.concatenate([[0], np.cumsum(lengths)])


def encoder_for(
    tokenizer: tokenizers.Tokenizer, front: list[int], back: list[int]
) -> LibraryEncoder | NativeEncoder | NormalizingEncoder:
    """The fastest encoder that gives this tokenizer's ids; `front` and `back` stand around every document."""
    library = native.library()
    # What the library made of the file, not the file: it fills in defaults, and numbers added tokens by itself.
    spec = json.loads(tokenizer.to_str())
    model = byte_level.native_model(spec) if library else None
    if model is None:
        return LibraryEncoder(tokenizer, front, back)
    encoder = NativeEncoder(bpe.BpeEncoder(library, model), front, back, byte_level.adds_space(spec))
    if not byte_level.normalizes(spec):
        return encoder
    return NormalizingEncoder(encoder, LibraryEncoder(tokenizer, front, back), byte_level.finds_tokens_first(spec))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def utf8(texts: Sequence[str | bytes]) -> list[bytes]:
    """UTF-8 of documents, of which some may be that already; raises UserError for lone surrogates, which it cannot hold."""
    try:
        return [text if isinstance(text, bytes) else text.encode() for text in texts]
    except UnicodeEncodeError as error:
        number = next(number for number, text in enumerate(texts) if text is error.object)
        raise UserError(f"document {number} holds a lone surrogate at character {error.start}") from error


def _batches(texts: list[bytes]) -> Iterator[list[str]]:
    start = size = 0
    for position, text in enumerate(texts):
        size += len(text)
        if size >= BATCH:
            yield [text.decode() for text in texts[start : position + 1]]
            start, size = position + 1, 0
    if start < len(texts):
        yield [text.decode() for text in texts[start:]]
