"""The rows that each step trains on, shared among the processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from llmctl.errors import CalledWrongly
from llmctl.train import distributed
from llmctl.train.plan import Plan


class Batch(Protocol):
    """Rows as the objective takes them."""

    @property
    def n_targets(self) -> int:
        """How many tokens (or labels, or pairs) its loss is a sum over."""

    def tensors(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """The arguments of the objective."""

    def without_targets(self) -> Batch:
        """The same shapes, with a loss of nothing: for a rank that has no row left while others have."""


class Rows(Protocol):
    """One split, cut into rows; row n is the same in every process, on every world size and after every resume."""

    unit: str
    """What the loss is a mean over: "token", "masked token", ..."""
    rows_per_epoch: int
    n_tokens: int
    n_bytes: int | None

    def train_batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` … of the endless shuffled sequence of epochs."""

    def validation_batches(self, n_rows: int) -> Iterator[Batch]:
        """All rows once, in order."""


class Feed:
    """This process's share of every step's rows, cut into micro batches, and the rows held out."""

    def __init__(self, train: Rows, val: Rows | None, plan: Plan):
        self.train, self.val = train, val
        self._batch_size = plan.batch_size
        self._rows_per_rank, left_over = divmod(plan.batch_size, distributed.world_size())
        if left_over:
            raise CalledWrongly(
                f"--batch-size {plan.batch_size} is no multiple of the {distributed.world_size()} processes"
            )
        self._at_once = min(plan.micro_batch_size or self._rows_per_rank, self._rows_per_rank)

    def micro_batches(self, step: int) -> tuple[list[Batch], int]:
        """This rank's micro batches of a step, and the number of targets of all ranks together (at least 1)."""
        first = step * self._batch_size + distributed.rank() * self._rows_per_rank
        batches = [
            self.train.train_batch(first + at, min(self._at_once, self._rows_per_rank - at))
            for at in range(0, self._rows_per_rank, self._at_once)
        ]
        n_targets = torch.tensor(sum(batch.n_targets for batch in batches))
        return batches, max(1, int(distributed.sum_over_ranks(n_targets)))

    @property
    def n_val_tokens(self) -> int:
        return self.val.n_tokens if self.val else 0

    def validation_batches(self) -> Iterator[Batch]:
        return self.val.validation_batches(self._at_once)
