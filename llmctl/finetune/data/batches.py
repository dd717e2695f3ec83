"""Batches of examples: several packed into a row and kept apart, or one to a row with padding behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from llmctl.data.masking import Masking
from llmctl.data.packing import IGNORE, Batch, permuted
from llmctl.finetune.data.encoding import Tokens
from llmctl.finetune.data.examples import LABELLED
from llmctl.finetune.data.fitting import Rows, best_fit
from llmctl.finetune.data.forms import PREFERENCES
from llmctl.finetune.data.mixing import Mixture
from llmctl.finetune.data.store import ExampleSet

Split = Literal["train", "val"]

_GROUPS_SORTED = 16
"""Batches whose examples are sorted by length together: enough to leave little padding, few enough to keep the order random."""
_UNITS = {
    "mlm": "masked token",
    "kto": "answer",
    **dict.fromkeys(LABELLED, "row"),
    **dict.fromkeys(PREFERENCES, "pair"),
}
"""What a loss is a mean over; tokens where nothing is said."""
_TRAIN, _VAL = 0, 1


@dataclass(frozen=True)
class ExampleBatch:
    """One example per row, padded behind; comparisons have two, those chosen in the first half, those rejected below.

    `inputs` and `targets` int64 [B, T] (rows of a classifier have no targets but IGNORE, and whole sequences as inputs);
    `lengths` int64 [B] counts the inputs of a row; `labels` as `ExampleSet.labels` has them, or None; `counted` bool
    [examples]: whose loss enters the sum.
    """

    inputs: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None
    counted: np.ndarray

    @property
    def n_targets(self) -> int:
        """Examples whose loss counts."""
        return int(self.counted.sum())

    def tensors(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """Inputs, targets, lengths, labels and what counts, on a device."""
        return _on_device((self.inputs, self.targets, self.lengths, self.labels, self.counted), device)

    def without_targets(self) -> ExampleBatch:
        return replace(self, counted=np.zeros_like(self.counted))


@dataclass(frozen=True)
class Seq2SeqBatch:
    """`sources` int64 [B, S] and their `source_lengths` [B] for the encoder; inputs and targets [B, T] of the decoder."""

    sources: np.ndarray
    source_lengths: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def tensors(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """Sources, their lengths, inputs and targets on a device."""
        return _on_device((self.sources, self.source_lengths, self.inputs, self.targets), device)

    def without_targets(self) -> Seq2SeqBatch:
        return replace(self, targets=np.full_like(self.targets, IGNORE))


class _Split:
    """The example numbers of a split, and the order in which `rows_per_source` of it are visited."""

    n_bytes = None
    """What is learned is a part of the text only, so there is no number of bytes to divide by."""

    def __init__(self, examples: ExampleSet, split: Split):
        self._examples = examples
        self._numbers = examples.train if split == "train" else [examples.val]
        self._weights = examples.weights if split == "train" else None
        self.unit = _UNITS.get(examples.objective, "token")
        self.n_tokens = sum(examples.n_tokens(numbers) for numbers in self._numbers)

    def _ordered(self, rows_per_source: Sequence[int], seed: int) -> None:
        self._order = Mixture(rows_per_source, self._weights, seed)
        self.rows_per_epoch = self._order.size


class PackedExamples(_Split):
    """Rows of `seq_len` inputs, each holding as many whole examples as fit; `documents` tells them apart.

    For the next token an example of n tokens takes n - 1 inputs, with `masking` all n. The rows of a source stay the same
    in every epoch, their order changes; row n is the same in every process and after every resume.
    """

    def __init__(
        self,
        examples: ExampleSet,
        split: Split,
        seq_len: int,
        *,
        seed: int = 0,
        masking: Masking | None = None,
        one_per_row: bool = False,
    ):
        super().__init__(examples, split)
        self.seq_len, self.seed, self._masking, self._one_per_row = seq_len, seed, masking, one_per_row
        self._rows = [self._pack(numbers) for numbers in self._numbers]
        self._ordered([len(rows) for rows in self._rows], seed)

    def train_batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` … of the endless shuffled sequence of epochs."""
        numbers = range(first_row, first_row + n_rows)
        rows = [self._row(*self._order.at(number)) for number in numbers]
        return self._batch(rows, [(_TRAIN, number) for number in numbers])

    def validation_batches(self, n_rows: int) -> Iterator[Batch]:
        """All rows once, in order; the last batch may be smaller."""
        places = [(source, row) for source, rows in enumerate(self._rows) for row in range(len(rows))]
        for at in range(0, len(places), n_rows):
            part = [self._row(*place) for place in places[at : at + n_rows]]
            yield self._batch(part, [(_VAL, at + i) for i in range(len(part))])

    def _pack(self, numbers: np.ndarray) -> Rows:
        if self._one_per_row:
            return Rows(np.arange(len(numbers)))
        return best_fit(self._examples.lengths(numbers) - (self._masking is None), self.seq_len)

    def _row(self, source: int, row: int) -> np.ndarray:
        """The numbers of a row's examples."""
        return self._numbers[source][self._rows[source][row]]

    def _batch(self, rows: Sequence[np.ndarray], seeds: Sequence[tuple[int, int]]) -> Batch:
        shape = len(rows), self.seq_len
        inputs, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        for row, (examples, seed) in enumerate(zip(rows, seeds)):
            rng = np.random.default_rng([self.seed, *seed])  # what is masked depends on the row's number alone
            at = 0
            for document, example in enumerate(examples):
                (tokens,) = self._examples.read(int(example))
                own_inputs, own_targets = self._inputs_and_targets(tokens, rng)
                place = slice(at, at + len(own_inputs))
                inputs[row, place], targets[row, place], documents[row, place] = own_inputs, own_targets, document
                at = place.stop
            # padding behind is seen by nothing where nothing looks ahead, and else by nothing but itself
            documents[row, at:] = len(examples) - (self._masking is None)
        return Batch(inputs, targets, documents if documents.any() else None)

    def _inputs_and_targets(self, tokens: Tokens, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        if self._masking is None:
            return shifted(tokens)
        return self._masking.hide(tokens.ids, np.ones(len(tokens.ids), bool), rng)


class PaddedExamples(_Split):
    """One example per row, in batches of like length where they are drawn `group` at a time.

    `decoder_start` is the first input of a seq2seq model's decoder. Row n is the same in every process and after every
    resume.
    """

    def __init__(
        self,
        examples: ExampleSet,
        split: Split,
        group: int,
        *,
        seed: int = 0,
        pad_id: int = 0,
        decoder_start: int | None = None,
    ):
        super().__init__(examples, split)
        self._group, self._seed, self._pad_id, self._decoder_start = group, seed, pad_id, decoder_start
        self._ordered([len(numbers) for numbers in self._numbers], seed)
        # no more than an epoch, or sorting would put an example beside itself
        self._n_groups = max(1, min(_GROUPS_SORTED, self.rows_per_epoch // group))
        self._window = lru_cache(maxsize=2)(self._sorted_window)

    def train_batch(self, first_row: int, n_rows: int) -> Batch | ExampleBatch | Seq2SeqBatch:
        """Examples `first_row` … of the endless shuffled sequence of epochs."""
        places = (divmod(number, self._n_groups * self._group) for number in range(first_row, first_row + n_rows))
        return self._batch([self._window(window)[index] for window, index in places])

    def validation_batches(self, n_rows: int) -> Iterator[Batch | ExampleBatch | Seq2SeqBatch]:
        """All examples once, by length; the last batch may be smaller."""
        numbers = np.concatenate(self._numbers)
        numbers = numbers[np.argsort(self._examples.lengths(numbers), kind="stable")]
        for at in range(0, len(numbers), n_rows):
            yield self._batch(numbers[at : at + n_rows])

    def _sorted_window(self, window: int) -> np.ndarray:
        """Example numbers of a stretch of the sequence: neighbours have like lengths, the groups any order."""
        size = self._n_groups * self._group
        places = [self._order.at(window * size + i) for i in range(size)]
        numbers = np.array([self._numbers[source][index] for source, index in places])
        numbers = numbers[np.argsort(self._examples.lengths(numbers), kind="stable")]
        groups = numbers.reshape(self._n_groups, self._group)
        return groups[[permuted(i, self._n_groups, self._seed, window) for i in range(self._n_groups)]].ravel()

    def _batch(self, numbers: Sequence[int]) -> Batch | ExampleBatch | Seq2SeqBatch:
        examples = self._examples
        columns = list(zip(*(examples.read(int(number)) for number in numbers)))
        labels = None if examples.labels is None else examples.labels[np.asarray(numbers)]
        if examples.objective == "seq2seq":
            return self._sources_and_targets(*columns)
        if examples.objective in (*LABELLED, "reward"):
            inputs, lengths = padded([tokens.ids for column in columns for tokens in column], self._pad_id)
            targets = np.full_like(inputs, IGNORE)
        else:
            pairs = [shifted(tokens) for column in columns for tokens in column]
            inputs, lengths = padded([pair[0] for pair in pairs], self._pad_id)
            targets, _ = padded([pair[1] for pair in pairs], IGNORE)
        if labels is None and len(columns) == 1:
            return Batch(inputs, targets, None)  # nothing looks ahead, so padding behind needs no mask
        return ExampleBatch(inputs, targets, lengths, labels, np.ones(len(numbers), bool))

    def _sources_and_targets(self, sources: Sequence[Tokens], answers: Sequence[Tokens]) -> Seq2SeqBatch:
        read, lengths = padded([tokens.ids for tokens in sources], self._pad_id)
        inputs, _ = padded([np.append(self._decoder_start, tokens.ids[:-1]) for tokens in answers], self._pad_id)
        targets, _ = padded([tokens.ids for tokens in answers], IGNORE)
        return Seq2SeqBatch(read, lengths, inputs, targets)


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


def _on_device(arrays: Sequence[np.ndarray | None], device: torch.device) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if array is None else torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
