"""Rows of equal length cut from a token sequence: for training in a shuffled order, for validation from end to end.

The end-of-document token that closes a document is also the first input of the next one, so that a document's first token
is predicted too. Where the tokenizer writes a beginning-of-document token, that is the first input instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from llmctl.data.corpus import TokenView
from llmctl.errors import UserError

IGNORE = -100
"""Target of a position that is neither learned nor scored."""


@dataclass(frozen=True)
class Batch:
    """`inputs` and `targets` int64 [B, T]; `documents` int64 [B, T] numbers the packed documents, None when each row is one."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def tensors(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """Inputs, targets and documents on a device."""
        arrays = (self.inputs, self.targets, self.documents)
        return tuple(
            None if array is None else torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )

    def without_targets(self) -> Batch:
        """The same inputs, of which nothing is learned or scored."""
        return replace(self, targets=np.full_like(self.targets, IGNORE))


class PackedRows:
    """Rows of `seq_len` tokens from one split.

    Every epoch cuts the sequence at another offset and visits the rows in another order, both a function of the seed alone:
    row number n is the same in every process, on every world size and after every resume.
    """

    unit = "token"

    def __init__(self, view: TokenView, seq_len: int, tokenizer, *, seed: int = 0, isolate_documents: bool = True):
        if view.n_tokens < seq_len + 1:
            shorter = f", or --seq-len {view.n_tokens - 1} at most" if view.n_tokens > 2 else ""
            raise UserError(
                f"the corpus has {view.n_tokens} tokens, one sequence needs {seq_len + 1}",
                hint=f"give more text{shorter}",
            )
        self.view, self.seq_len, self.seed, self.isolate = view, seq_len, seed, isolate_documents
        self.closes_with_eos = tokenizer.eos_id is not None and not tokenizer.adds_bos
        self.eos_id = tokenizer.eos_id
        # Where an input belongs to the next document already: at its first token, or at the end token before it.
        self._borders = view.starts[1:] - (1 if self.closes_with_eos else 0)
        self.rows_per_epoch = max(1, (view.n_tokens - seq_len) // seq_len)
        self._slack = min(seq_len - 1, view.n_tokens - 1 - self.rows_per_epoch * seq_len)

    @property
    def n_tokens(self) -> int:
        return self.view.n_tokens

    @property
    def n_bytes(self) -> int | None:
        """Of the text behind all tokens."""
        return self.view.n_bytes

    def train_batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` … of the endless shuffled sequence of epochs."""
        return self._batch([self._training_start(number) for number in range(first_row, first_row + n_rows)])

    def validation_batches(self, n_rows: int):
        """All tokens once, in order, each predicted from the tokens before it in its row; the last batch may be smaller."""
        first = -1 if self.closes_with_eos else 0
        starts = list(range(first, self.view.n_tokens - 1, self.seq_len))
        for at in range(0, len(starts), n_rows):
            yield self._batch(starts[at : at + n_rows])

    def _training_start(self, number: int) -> int:
        epoch, index = divmod(number, self.rows_per_epoch)
        offset = int(np.random.default_rng([self.seed, epoch]).integers(0, self._slack + 1))
        return offset + permuted(index, self.rows_per_epoch, self.seed, epoch) * self.seq_len

    def _batch(self, starts: list[int]) -> Batch:
        rows = [self._row(start) for start in starts]
        inputs, targets, documents = (np.stack(part) for part in zip(*rows, strict=True))
        several = bool((documents[:, :1] != documents[:, -1:]).any())
        return Batch(inputs, targets, documents if several and self.isolate else None)

    def _row(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stop = min(start + self.seq_len + 1, self.view.n_tokens)
        ids = self.view.read(max(start, 0), stop)
        if start < 0:
            ids = np.concatenate([[self.eos_id], ids])
        mask = self.view.loss_mask(max(start, 0), stop)
        targets = ids[1:].copy()
        if mask is not None:
            targets[~mask[-len(targets) :]] = IGNORE
        # documents of every id read; a target across a border that has no shared token is nobody's continuation
        documents = np.searchsorted(self._borders, np.arange(start, stop), side="right")
        if not self.closes_with_eos:
            targets[documents[1:] != documents[:-1]] = IGNORE
        missing = self.seq_len - len(targets)
        inputs, documents = np.pad(ids[:-1], (0, missing)), np.pad(documents[:-1], (0, missing), mode="edge")
        return inputs, np.pad(targets, (0, missing), constant_values=IGNORE), documents


def permuted(index: int, n: int, seed: int, epoch: int) -> int:
    """The image of `index` under a pseudo-random permutation of range(n), without memory.

    A four-round Feistel network on the next even number of bits, walked until it lands inside (Black and Rogaway 2002).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(4):
            left, right = right, left ^ (_mix(right, seed, epoch, turn) & low)
        index = left << half | right
        if index < n:
            return index


def _mix(value: int, seed: int, epoch: int, turn: int) -> int:
    """SplitMix64's finalizer over the four numbers (Steele, Lea and Flood 2014)."""
    z = value
    for word in (seed, epoch, turn):
        z = (z + (word + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        z ^= z >> 31
    return z
