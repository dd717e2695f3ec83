"""Chunks of text to rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmctl.data.chunks import PIECE, Chunk
from llmctl.tokenizer import Tokenizer

# A tokenizer that gives the parts of this the ids of the whole does not mind where a document is cut.
_PROBE = ("One two,\n", "three (4)\n", "Élan", " vital", " 12")


@dataclass
class Rows:
    """Documents as the token stream takes them; `sizes` int64 [n] is the UTF-8 length of each one's text."""

    ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    continues: bool
    split: str

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: slice) -> Rows:
        first, last, _ = rows.indices(len(self))
        offsets = self.offsets[first : last + 1]
        return Rows(self.ids, offsets, self.sizes[first:last], self.continues and first == 0, self.split)


class ChunkEncoder:
    """Encodes chunks with `threads` threads; texts that were cut from one document become one row again."""

    def __init__(self, tokenizer: Tokenizer, threads: int | None = None):
        self.tokenizer, self._threads = tokenizer, threads
        self._front, self._back = map(len, tokenizer.document_edges)
        whole = tokenizer.encode("".join(_PROBE), add_special_tokens=False)
        parts = [token for part in _PROBE for token in tokenizer.encode(part, add_special_tokens=False)]
        self.cuts_exactly = whole == parts
        self.piece = PIECE if self.cuts_exactly else None

    def encode(self, chunk: Chunk) -> Rows:
        ids, offsets = self.tokenizer.encode_documents(chunk.texts, self._threads)
        continues = bool(chunk.joined[0])
        if not chunk.joined.any() and not chunk.unfinished:
            return Rows(ids, offsets, chunk.sizes, continues, chunk.split)
        lengths = np.diff(offsets)
        keep = np.ones(len(ids), bool)
        for number in np.flatnonzero(chunk.joined):
            keep[offsets[number] : offsets[number] + self._front] = False
            lengths[number] -= self._front
        goes_on = np.append(chunk.joined[1:], chunk.unfinished)
        for number in np.flatnonzero(goes_on):
            keep[offsets[number + 1] - self._back : offsets[number + 1]] = False
            lengths[number] -= self._back
        firsts = np.union1d([0], np.flatnonzero(~chunk.joined))
        offsets = np.concatenate([[0], np.cumsum(np.add.reduceat(lengths, firsts))])
        return Rows(ids[keep], offsets, np.add.reduceat(chunk.sizes, firsts), continues, chunk.split)
