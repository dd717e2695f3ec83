"""Chunks of text to rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmctl.data.chunks import Chunk
from llmctl.data.text import next_safe_cut
from llmctl.tokenizer import Tokenizer

# Long texts are cut into pieces of about this many bytes, so that all threads of the encoder have work.
PIECE = 1 << 16
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

    def encode(self, chunk: Chunk) -> Rows:
        texts, joined = self._pieces(chunk) if self.cuts_exactly else (chunk.texts, chunk.joined)
        ids, offsets = self.tokenizer.encode_documents(texts, self._threads)
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        if not any(joined) and not chunk.unfinished:
            return Rows(ids, offsets, sizes, False, chunk.split)
        is_joined = np.array(joined)
        goes_on = np.append(is_joined[1:], chunk.unfinished)
        starts, stops = offsets[:-1] + self._front * is_joined, offsets[1:] - self._back * goes_on
        firsts = np.union1d([0], np.flatnonzero(~is_joined))
        lengths = np.add.reduceat(stops - starts, firsts)
        return Rows(
            ids=np.concatenate([ids[start:stop] for start, stop in zip(starts, stops, strict=True)]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            sizes=np.add.reduceat(sizes, firsts),
            continues=bool(joined[0]),
            split=chunk.split,
        )

    def _pieces(self, chunk: Chunk) -> tuple[list[bytes], list[bool]]:
        """The texts, with the long ones cut up, and which of them go on with the one before."""
        texts, joined = [], []
        for text, continues in zip(chunk.texts, chunk.joined, strict=True):
            start = 0
            while len(text) - start >= 2 * PIECE and (cut := next_safe_cut(text, start + PIECE)) is not None:
                texts.append(text[start:cut])
                joined.append(continues)
                start, continues = cut, True
            texts.append(text[start:] if start else text)
            joined.append(continues)
        return texts, joined
