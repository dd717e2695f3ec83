"""Byte-level BPE of many documents on native threads."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from llmctl.ops import native

# LLMCTL_SPLIT_* of csrc/llmctl.h.
SPLIT_NONE, SPLIT_GPT2, SPLIT_CL100K, SPLIT_QWEN2, SPLIT_O200K, SPLIT_DIGITS = range(6)
# The id of an added token that is found but stays text.
STAYS_TEXT = 2**32 - 1


@dataclass(frozen=True)
class BpeModel:
    """A tokenizer in bytes and ids: `merges` are (left, right, merged) in order of rank, `words` are tokens whatever
    the merges say, `tokens` are found in the text wherever they stand, leftmost and longest first."""

    split: int
    byte_ids: list[int]
    merges: list[tuple[int, int, int]]
    words: dict[bytes, int] = field(default_factory=dict)
    tokens: dict[bytes, int] = field(default_factory=dict)


class BpeEncoder:
    """The native encoder of one model; it keeps the words that it has met, in bounded memory."""

    def __init__(self, library: ctypes.CDLL, model: BpeModel):
        self._library = library
        handle = ctypes.c_void_p()
        byte_ids = np.array(model.byte_ids, np.uint32)
        merges = np.array(model.merges, np.uint32).reshape(-1, 3)
        native.call(
            library,
            "llmctl_bpe_create",
            model.split,
            byte_ids.ctypes.data,
            merges.ctypes.data,
            len(merges),
            ctypes.byref(handle),
        )
        self._handle = handle
        weakref.finalize(self, library.llmctl_bpe_destroy, handle)
        self._add("llmctl_bpe_add_words", model.words)
        self._add("llmctl_bpe_add_tokens", model.tokens)

    def encode(
        self, documents: list[bytes], front: np.ndarray, back: np.ndarray, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of UTF-8 documents, each between `front` and `back` (uint32): ids uint32 [n], offsets int64 [documents + 1]."""
        text, text_offsets = _joined(documents)
        ids = np.empty(len(text) + len(documents) * (len(front) + len(back)), np.uint32)
        offsets = np.zeros(len(documents) + 1, np.int64)
        native.call(
            self._library,
            "llmctl_bpe_encode",
            self._handle,
            text,
            text_offsets.ctypes.data,
            len(documents),
            front.ctypes.data,
            len(front),
            back.ctypes.data,
            len(back),
            threads,
            ids.ctypes.data,
            offsets.ctypes.data,
        )
        # One id per byte was the room; what is left over goes back to the system, without a copy.
        ids.resize(int(offsets[-1]), refcheck=False)
        return ids, offsets

    def _add(self, name: str, entries: dict[bytes, int]) -> None:
        text, offsets = _joined(entries)
        ids = np.fromiter(entries.values(), np.uint32, len(entries))
        native.call(self._library, name, self._handle, text, offsets.ctypes.data, ids.ctypes.data, len(entries))


def _joined(parts: Iterable[bytes]) -> tuple[bytes, np.ndarray]:
    lengths = itertools.accumulate(map(len, parts), initial=0)
    return b"".join(parts), np.fromiter(lengths, np.int64)
