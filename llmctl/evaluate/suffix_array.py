"""A suffix array over a token stream: how often a span of tokens occurs in it."""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

PIECE_TOKENS = 1 << 22


class Tokens(Protocol):
    """`data.corpus.TokenView` is such a thing."""

    n_tokens: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids int64 [stop - start]."""


class SuffixArray:
    """Answers for spans of up to `depth` tokens; use it in a `with` block, at whose end its files go.

    It is built in pieces of `piece` tokens, so that memory does not grow with the stream (about 40 bytes for each token of
    one piece); 8 bytes on disk for each token of the stream are mapped. Suffixes are ordered by their first `depth` tokens
    with prefix doubling (Manber and Myers, 1993).
    """

    def __init__(self, tokens: Tokens, depth: int = 64, piece: int = PIECE_TOKENS):
        self.depth = depth
        self._folder = tempfile.TemporaryDirectory(prefix="llmctl-suffixes-")
        self._pieces = []
        for number, start in enumerate(range(0, tokens.n_tokens, piece)):
            own = min(piece, tokens.n_tokens - start)
            # what follows the piece is there too, for the spans that begin near its end
            ids_N = tokens.read(start, min(start + own + depth - 1, tokens.n_tokens))
            order = _order(ids_N, depth)
            path = Path(self._folder.name, str(number))
            self._pieces.append(_Piece.write(path, ids_N, order[order < own]))

    def __enter__(self) -> SuffixArray:
        return self

    def __exit__(self, *_) -> None:
        self._pieces = []
        self._folder.cleanup()

    def count(self, span: Sequence[int]) -> int:
        """How often these tokens occur one behind the other. Raises ValueError for more than `depth` of them."""
        if len(span) > self.depth:
            raise ValueError(f"a span of {len(span)} tokens; the array knows {self.depth}")
        return sum(piece.count(_bytes(span)) for piece in self._pieces)

    def longest(self, text: Sequence[int]) -> int:
        """Tokens of the longest span within a text, of up to `depth`, that occurs in the stream."""
        best, start = 0, 0
        while start + best < len(text) and best < self.depth:
            if self.count(text[start : start + best + 1]):
                best += 1
            else:
                start += 1
        return best


@dataclass(frozen=True)
class _Piece:
    """`text` are the tokens, four bytes each with the highest first, so that bytes compare as tokens do."""

    text: np.memmap
    order: np.memmap

    @classmethod
    def write(cls, path: Path, ids_N: np.ndarray, order: np.ndarray) -> _Piece:
        files = path.with_suffix(".text"), path.with_suffix(".order")
        ids_N.astype(">u4").tofile(files[0])
        order.astype(np.int32).tofile(files[1])
        return cls(np.memmap(files[0], np.uint8, "r"), np.memmap(files[1], np.int32, "r"))

    def count(self, span: bytes) -> int:
        def at(position: int) -> bytes:
            return self.text[position * 4 : position * 4 + len(span)].tobytes()

        first = bisect.bisect_left(self.order, span, key=at)
        return bisect.bisect_right(self.order, span, lo=first, key=at) - first


def _bytes(span: Sequence[int]) -> bytes:
    return np.asarray(span, ">u4").tobytes()


def _order(ids_N: np.ndarray, depth: int) -> np.ndarray:
    """Positions int64 [N] in the order of the first `depth` tokens from there; a text that ends comes first."""
    _, rank_N = np.unique(ids_N, return_inverse=True)
    rank_N = rank_N.astype(np.int64) + 1
    length = 1
    while length < depth and rank_N.max() < len(rank_N):
        follows_N = np.zeros_like(rank_N)
        follows_N[:-length] = rank_N[length:]
        key_N = rank_N * (len(rank_N) + 1) + follows_N
        order = np.argsort(key_N, kind="stable")
        sorted_N = key_N[order]
        rank_N[order] = 1 + np.cumsum(np.concatenate([[0], sorted_N[1:] != sorted_N[:-1]]))
        length *= 2
    return np.argsort(rank_N, kind="stable")
