"""Batches of examples: several packed into a row and kept apart, or one to a row with padding behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from llmctl.data.packing import IGNORE, Batch, permuted
from llmctl.finetune.data.encoding import Tokens
from llmctl.finetune.data.fitting import best_fit
from llmctl.finetune.data.mixing import Mixture
from llmctl.finetune.data.store import ExampleSet

_GROUPS_SORTED = 16
"""Batches whose examples are sorted by length together: enough to leave little padding, few enough to keep the order random."""


@dataclass(frozen=True)
class PaddedBatch(Batch):
    """One example per row; `lengths` int64 [B] counts its inputs, behind which there is padding."""

    lengths: np.ndarray


@dataclass(frozen=True)
class LabelledBatch(PaddedBatch):
    """`inputs` are whole sequences; `labels` [B] or [B, n_classes] as `ExampleSet.labels` has them."""

    labels: np.ndarray


@dataclass(frozen=True)
class Seq2SeqBatch(PaddedBatch):
    """`sources` int64 [B, S] for the encoder with `source_lengths` [B]; inputs and targets are the decoder's."""

    sources: np.ndarray
    source_lengths: np.ndarray


class Rows(Protocol):
    """What training asks of its rows; those of `data.packing.PackedRows` serve it too."""

    rows_per_epoch: int

    def train_batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` … of the endless shuffled sequence: the same for every process and after every resume."""

    def validation_batches(self, n_rows: int) -> Iterator[Batch]:
        """Every held-out example once, in order; the last batch may be smaller."""


class PackedExamples:
    """Rows of `seq_len` inputs, each holding as many whole examples as fit; `documents` tells them apart.

    An example of n tokens takes n - 1 inputs. The rows of a source stay the same in every epoch, their order changes.
    """

    def __init__(self, examples: ExampleSet, seq_len: int, seed: int = 0):
        self._examples, self._seq_len = examples, seq_len
        self._train = [self._pack(numbers) for numbers in examples.train]
        self._val = self._pack(examples.val)
        self._order = Mixture([len(rows) for rows in self._train], examples.weights, seed)
        self.rows_per_epoch = self._order.size

    def train_batch(self, first_row: int, n_rows: int) -> Batch:
        places = [self._order.at(number) for number in range(first_row, first_row + n_rows)]
        return self._batch([self._train[source][index] for source, index in places])

    def validation_batches(self, n_rows: int) -> Iterator[Batch]:
        for at in range(0, len(self._val), n_rows):
            yield self._batch(self._val[at : at + n_rows])

    def _pack(self, numbers: np.ndarray) -> list[np.ndarray]:
        lengths = (self._examples.lengths(numbers) - 1).tolist()
        return [numbers[row] for row in best_fit(lengths, self._seq_len)]

    def _batch(self, rows: Sequence[np.ndarray]) -> Batch:
        shape = len(rows), self._seq_len
        inputs, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        for row, numbers in enumerate(rows):
            at = 0
            for document, number in enumerate(numbers):
                (tokens,) = self._examples.read(int(number))
                place = slice(at, at + len(tokens.ids) - 1)
                inputs[row, place], targets[row, place] = shifted(tokens)
                documents[row, place] = document
                at = place.stop
            documents[row, at:] = len(numbers)
        return Batch(inputs, targets, documents)


class PaddedExamples:
    """One example per row for `objective`: batches of like length where they are drawn `group` at a time.

    Comparisons of answers give 2 B rows for B examples: those chosen, then those rejected. `decoder_start` is the first
    input of a seq2seq model's decoder.
    """

    def __init__(
        self, examples: ExampleSet, group: int, seed: int = 0, pad_id: int = 0, decoder_start: int | None = None
    ):
        self._examples, self._group, self._seed = examples, group, seed
        self._pad_id, self._decoder_start = pad_id, decoder_start
        self._order = Mixture([len(numbers) for numbers in examples.train], examples.weights, seed)
        self.rows_per_epoch = self._order.size
        self._window = lru_cache(maxsize=2)(self._sorted_window)

    def train_batch(self, first_row: int, n_rows: int) -> PaddedBatch:
        window_size = _GROUPS_SORTED * self._group
        places = (divmod(number, window_size) for number in range(first_row, first_row + n_rows))
        return self._batch([self._window(window)[index] for window, index in places])

    def validation_batches(self, n_rows: int) -> Iterator[PaddedBatch]:
        numbers = self._examples.val[np.argsort(self._examples.lengths(self._examples.val), kind="stable")]
        for at in range(0, len(numbers), n_rows):
            yield self._batch(numbers[at : at + n_rows])

    def _sorted_window(self, window: int) -> np.ndarray:
        """Example numbers of a stretch of the sequence: neighbours have like lengths, the groups any order."""
        first = window * _GROUPS_SORTED * self._group
        places = [self._order.at(first + i) for i in range(_GROUPS_SORTED * self._group)]
        numbers = np.array([self._examples.train[source][index] for source, index in places])
        numbers = numbers[np.argsort(self._examples.lengths(numbers), kind="stable")]
        groups = numbers.reshape(_GROUPS_SORTED, self._group)
        return groups[[permuted(i, _GROUPS_SORTED, self._seed, window) for i in range(_GROUPS_SORTED)]].ravel()

    def _batch(self, numbers: Sequence[int]) -> PaddedBatch:
        read = [self._examples.read(int(number)) for number in numbers]
        labels = None if self._examples.labels is None else self._examples.labels[np.asarray(numbers)]
        firsts = [sequences[0] for sequences in read]
        seconds = [sequences[1] for sequences in read if len(sequences) > 1]
        if self._examples.objective == "seq2seq":
            sources, source_lengths = padded([each.ids for each in firsts], self._pad_id)
            inputs = [np.append(self._decoder_start, each.ids[:-1]) for each in seconds]
            return Seq2SeqBatch(*self._decoder(inputs, seconds), sources, source_lengths)
        if self._examples.objective in ("classify", "regress", "mlm"):
            inputs, lengths = padded([each.ids for each in firsts], self._pad_id)
            unlabelled = PaddedBatch(inputs, np.full_like(inputs, IGNORE), None, lengths)
            return unlabelled if labels is None else LabelledBatch(*vars(unlabelled).values(), labels)
        inputs, targets = zip(*map(shifted, firsts + seconds))
        batch = PaddedBatch(*self._columns(inputs, targets))
        return batch if labels is None else LabelledBatch(*vars(batch).values(), labels)

    def _decoder(self, inputs: Sequence[np.ndarray], sequences: Sequence[Tokens]) -> tuple:
        # the first target is predicted too, from the start token
        return self._columns(inputs, [each.ids for each in sequences])

    def _columns(self, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> tuple:
        inputs_BT, lengths = padded(inputs, self._pad_id)
        return inputs_BT, padded(targets, IGNORE)[0], None, lengths


def shifted(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of next-token prediction, int64 [n - 1]; targets that are not learned are IGNORE."""
    return tokens.ids[:-1], np.where(tokens.learned[1:], tokens.ids[1:], IGNORE)


def padded(sequences: Sequence[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B, longest] with `fill` behind each sequence, and the lengths int64 [B]."""
    lengths = np.array([len(each) for each in sequences], np.int64)
    rows = np.full((len(sequences), lengths.max(initial=0)), fill, np.int64)
    for row, each in zip(rows, sequences):
        row[: len(each)] = each
    return rows, lengths
