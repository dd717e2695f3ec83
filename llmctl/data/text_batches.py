"""Texts through a model in batches of like length, with the results in the order of the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

import torch

from llmctl.data.text_rows import TextRow
from llmctl.errors import UserError
from llmctl.tokenizer import Tokenizer

Result = TypeVar("Result")
_BATCHES_SORTED = 64
"""So many batches are read ahead, and made of texts of like length."""


@dataclass
class TextBatches:
    """`encode` maps a text to its ids; texts of more than `max_tokens` are an error, or cut in front of what ends them.

    `n_cut` counts those that were cut.
    """

    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    max_tokens: int | None
    batch_size: int
    on_long: Literal["error", "truncate"] = "error"
    n_cut: int = 0

    def results(
        self, rows: Iterable[TextRow], run: Callable[[list[list[int]]], Sequence[Result]]
    ) -> Iterator[tuple[TextRow, Result]]:
        """Each row with what `run` gives for its ids. Raises UserError for a text that is empty or does not fit."""
        rows = iter(rows)
        while window := list(islice(rows, self.batch_size * _BATCHES_SORTED)):
            ids = [self._encoded(row) for row in window]
            order = sorted(range(len(window)), key=lambda i: len(ids[i]))
            found = {}
            for at in range(0, len(order), self.batch_size):
                batch = order[at : at + self.batch_size]
                found |= zip(batch, run([ids[i] for i in batch]), strict=True)
            yield from ((row, found[number]) for number, row in enumerate(window))

    def padded(self, ids: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [B, T] with padding behind, bool [B, T]: what is none)."""
        lengths_B = torch.tensor([len(row) for row in ids], device=device)
        padding = self.tokenizer.pad_id or 0
        inputs_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in ids], True, padding).to(device)
        return inputs_BT, torch.arange(inputs_BT.shape[1], device=device) < lengths_B[:, None]

    def _encoded(self, row: TextRow) -> list[int]:
        ids = self.encode(row.text)
        if not ids:
            raise UserError(f"{row.name}: an empty text has no tokens")
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return ids
        if self.on_long == "error":
            raise UserError(
                f"{row.name}: {len(ids)} tokens, the model's context is {self.max_tokens}",
                hint="--on-long truncate cuts such texts",
            )
        self.n_cut += 1
        n_behind = len(self.tokenizer.text_edges[1])
        return ids[: self.max_tokens - n_behind] + ids[len(ids) - n_behind :]
