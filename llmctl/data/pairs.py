"""Rows of two sides for an encoder-decoder: a source that is read, and a target that is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmctl.data.corpus import TokenView
from llmctl.data.masking import row_bounds
from llmctl.data.packing import IGNORE, permuted
from llmctl.data.span_corruption import Corruption

_TRAIN, _VAL = 0, 1
WIDTH_STEP = 32
"""Rows are filled up to a multiple of this: few different shapes, each of which may be compiled."""


@dataclass(frozen=True)
class PairBatch:
    """int64 arrays: `sources` [B, S]; `inputs` and `targets` [B, T] of the decoder.

    `source_documents` [B, S] and `documents` [B, T] number the pairs within a row, alike on both sides; padding has a number
    of its own. None where each row is one pair without padding.
    """

    sources: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray
    source_documents: np.ndarray | None
    documents: np.ndarray | None

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def tensors(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """The arguments of `train.objectives.TargetToken`."""
        arrays = (self.sources, self.inputs, self.targets, self.source_documents, self.documents)
        return tuple(
            None if array is None else torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )

    def without_targets(self) -> PairBatch:
        """The same inputs, of which nothing is learned or scored."""
        return replace(self, targets=np.full_like(self.targets, IGNORE))


Pair = tuple[np.ndarray, np.ndarray]
"""Source and target; the decoder's inputs are the target behind its start token."""


def pack(rows: Sequence[Sequence[Pair]], start_id: int, pad_id: int, longest: int) -> PairBatch:
    """Pairs side by side in rows, which are filled up to one width, at most to `longest`."""
    sources = [[source for source, _ in row] for row in rows]
    targets = [[target for _, target in row] for row in rows]
    inputs = [[np.concatenate([[start_id], target[:-1]]) for target in row] for row in targets]
    source_BS, source_documents_BS = _filled(sources, pad_id, longest)
    inputs_BT, documents_BT = _filled(inputs, pad_id, longest)
    targets_BT, _ = _filled(targets, IGNORE, longest)
    if all(len(row) == 1 for row in rows) and not (source_documents_BS.any() or documents_BT.any()):
        source_documents_BS = documents_BT = None
    return PairBatch(source_BS, inputs_BT, targets_BT, source_documents_BS, documents_BT)


def _filled(rows: Sequence[Sequence[np.ndarray]], filler: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of texts side by side, and the number of each token's text; padding's is one more than the last."""
    lengths = [sum(map(len, row)) for row in rows]
    widest = max(1, *lengths)
    # Rows of one length, as spans of equal texts give them, stay as they are.
    rounded = min(-(-widest // WIDTH_STEP) * WIDTH_STEP, longest)
    width = widest if min(lengths) == widest else max(widest, rounded)
    ids = np.full((len(rows), width), filler, dtype=np.int64)
    numbers = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = np.concatenate([*row, []])
        numbers[i] = len(row)
        numbers[i, : lengths[i]] = np.repeat(np.arange(len(row)), list(map(len, row)))
    return ids, numbers


class CorruptedRows:
    """Whole documents side by side, as far as they fit, each spoilt by itself and to be restored.

    A row holds up to `seq_len` tokens of text with what stands around each document. What is taken out depends on the seed
    and the number of the row alone; every epoch takes out something else, and every validation the same.
    """

    unit = "target token"
    n_bytes = None
    """What is written is no plain text, so there is no number of bytes to divide by."""

    def __init__(
        self,
        view: TokenView,
        seq_len: int,
        tokenizer,
        *,
        corruption: Corruption,
        start_id: int,
        seed: int = 0,
        isolate_documents: bool = True,
    ):
        self.view, self.seq_len, self.corruption, self.start_id = view, seq_len, corruption, start_id
        self.seed, self.isolate = seed, isolate_documents
        self.pad_id = start_id if tokenizer.pad_id is None else tokenizer.pad_id
        self._edges = tuple(np.array(edge, dtype=np.int64) for edge in tokenizer.document_edges)
        n_around = sum(map(len, self._edges))
        self._bounds = row_bounds(view.starts, view.n_tokens, max(corruption.least, seq_len - n_around))
        self.rows_per_epoch = len(self._bounds) - 1

    @property
    def n_tokens(self) -> int:
        return self.view.n_tokens

    def train_batch(self, first_row: int, n_rows: int) -> PairBatch:
        """Rows `first_row` … of the endless shuffled sequence of epochs."""
        rows = []
        for number in range(first_row, first_row + n_rows):
            epoch, index = divmod(number, self.rows_per_epoch)
            row = permuted(index, self.rows_per_epoch, self.seed, epoch)
            rows.append(self._pairs(row, np.random.default_rng([self.seed, _TRAIN, number])))
        return pack(rows, self.start_id, self.pad_id, self.seq_len)

    def validation_batches(self, n_rows: int) -> Iterator[PairBatch]:
        """All rows once, in order; the last batch may be smaller."""
        for at in range(0, self.rows_per_epoch, n_rows):
            numbers = range(at, min(at + n_rows, self.rows_per_epoch))
            rows = [self._pairs(row, np.random.default_rng([self.seed, _VAL, row])) for row in numbers]
            yield pack(rows, self.start_id, self.pad_id, self.seq_len)

    def _pairs(self, row: int, rng: np.random.Generator) -> list[Pair]:
        start, stop = self._bounds[row : row + 2].tolist()
        ids = self.view.read(start, stop)
        first, last = np.searchsorted(self.view.starts, [start, stop], side="left")
        borders = self.view.starts[first:last] - start if self.isolate else []
        texts = (self._text(part) for part in np.split(ids, borders))
        front, back = self._edges
        return [
            tuple(np.concatenate([front, side, back]) for side in self.corruption.pair(text, rng))
            for text in texts
            if len(text) >= self.corruption.least
        ]

    def _text(self, ids: np.ndarray) -> np.ndarray:
        """A document, or a piece of one, without what stands around documents."""
        front, back = self._edges
        if len(front) and np.array_equal(ids[: len(front)], front):
            ids = ids[len(front) :]
        if len(back) and np.array_equal(ids[-len(back) :], back):
            ids = ids[: -len(back)]
        return ids
