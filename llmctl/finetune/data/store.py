"""Tokenized examples on disk: a token stream with its loss mask, mapped when read, and an index beside it."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.data.corpus import Corpus
from llmctl.files import read_json
from llmctl.finetune.data.encoding import Tokens
from llmctl.finetune.data.examples import Example
from llmctl.finetune.data.template import with_template
from llmctl.streams import TokenStreamWriter
from llmctl.tokenizer import Tokenizer

_TOKENS, _INDEX, _SUMMARY = "examples.arrow", "index.npz", "summary.json"
_EXAMPLES_AT_ONCE = 1024


class ExampleWriter:
    """Writes examples of `width` sequences each into an existing directory."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, width: int):
        self._directory, self.width = directory, width
        self._file = open(directory / _TOKENS, "xb")
        self._writer = TokenStreamWriter(self._file, tokenizer, loss_mask=True)
        self._pending: list[Tokens] = []
        self.digests = array("Q")
        self.is_held_out = array("b")

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, example: Example) -> None:
        self._pending += example.sequences
        self.digests.append(example.digest())
        self.is_held_out.append(example.is_held_out)
        if len(self._pending) >= _EXAMPLES_AT_ONCE:
            self._flush()

    def close(self, index: dict[str, np.ndarray], summary: dict[str, Any]) -> None:
        """Complete the set; only then can it be opened."""
        self._flush()
        self._writer.close()
        np.savez(self._directory / _INDEX, **index)
        (self._directory / _SUMMARY).write_text(json.dumps(summary, ensure_ascii=False, indent=1))

    def _flush(self) -> None:
        if self._pending:
            ids, learned = (np.concatenate(part) for part in zip(*((each.ids, each.learned) for each in self._pending)))
            offsets = np.cumsum([0, *(len(each.ids) for each in self._pending)])
            self._writer.write(ids, offsets, loss_mask=learned)
            self._pending = []


class ExampleSet:
    """Examples as `prepare` left them in a directory.

    `tokenizer` has the chat template that the rows were rendered with; `objective`; `width` sequences per example; `label_names` of classes; `labels` (see `LabelTable.array`) or None;
    `weights` of the training sources, or None; `train` holds an array of example numbers per source, `val` those held
    out; `summary` what became of the rows. `sha256` identifies tokens, labels, split and weights.
    """

    def __init__(self, directory: str | os.PathLike):
        directory = Path(directory)
        self.summary: dict[str, Any] = read_json(directory / _SUMMARY)
        self.objective: str = self.summary["objective"]
        self.width: int = self.summary["width"]
        self.label_names: list[str] | None = self.summary["label_names"]
        self.weights: list[float] | None = self.summary["weights"]
        corpus = Corpus.open([directory / _TOKENS])
        self.tokenizer = corpus.tokenizer
        if template := self.summary["chat_template"]:
            self.tokenizer = with_template(self.tokenizer, template)
        self._view = corpus.split("train")
        with np.load(directory / _INDEX) as index:
            self.labels: np.ndarray | None = index["labels"] if "labels" in index else None
            sources, is_held_out = index["sources"], index["is_held_out"]
        self.train = [np.flatnonzero((sources == i) & ~is_held_out) for i in range(self.summary["n_sources"])]
        self.val = np.flatnonzero(is_held_out)
        ends = np.append(self._view.starts[1:], self._view.n_tokens)
        self._bounds = np.stack([self._view.starts, ends], 1).reshape(len(sources), self.width, 2)
        self.sha256 = self._identity(corpus.sha256, sources, is_held_out)

    def __len__(self) -> int:
        return len(self._bounds)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens int64 [n] of the longest sequence of each example."""
        spans = self._bounds[numbers]
        return (spans[..., 1] - spans[..., 0]).max(axis=1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of all."""
        return int((self._bounds[..., 1] - self._bounds[..., 0]).max())

    def n_tokens(self, numbers: np.ndarray) -> int:
        """Of all sequences of these examples."""
        spans = self._bounds[numbers]
        return int((spans[..., 1] - spans[..., 0]).sum())

    def read(self, number: int) -> list[Tokens]:
        """The sequences of one example."""
        spans = self._bounds[number].tolist()
        return [Tokens(self._view.read(a, b), self._view.loss_mask(a, b)) for a, b in spans]

    def _identity(self, corpus_sha256: str, *arrays: np.ndarray) -> str:
        state = hashlib.sha256(f"{corpus_sha256} {self.objective} {self.weights} {self.label_names}".encode())
        for values in (*arrays, *([] if self.labels is None else [self.labels])):
            state.update(np.ascontiguousarray(values).tobytes())
        return state.hexdigest()


def lowest(digests: np.ndarray, n_wanted: int) -> np.ndarray:
    """bool [n] of uint64 [n]: at least `n_wanted` examples, those of the lowest digests, so that equal ones are on the same side."""
    if n_wanted <= 0 or len(digests) == 0:
        return np.zeros(len(digests), bool)
    return digests <= np.partition(digests, n_wanted - 1)[n_wanted - 1]
