"""Steps and seconds: when something is due, and how fast the run goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple

from llmctl.train import distributed
from llmctl.train.events import Trained
from llmctl.train.loop import StepResult


class Interval:
    """Every so many steps (an int) or seconds (a float); None is never. Rank 0's clock decides for all."""

    def __init__(self, every: int | float | None):
        self.every = every
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        if self.every is None:
            return False
        if isinstance(self.every, int):
            return step % self.every == 0
        is_due = distributed.from_first(time.monotonic() - self._last >= self.every)
        if is_due:
            self._last = time.monotonic()
        return is_due


class Meter:
    """Collects steps and turns them into one report; `flops` is a training step's cost, `peak_flops` per second."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float):
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self._results: list[StepResult] = []
        self._durations: list[float] = []

    @property
    def unreported(self) -> list[tuple[float, ...]]:
        """The steps since the last report, as plain numbers: a resumed run reports them."""
        return [astuple(result) for result in self._results]

    def restore(self, unreported: Sequence[Sequence[float]]) -> None:
        self._results = [StepResult(*numbers) for numbers in unreported]

    def add(self, result: StepResult, seconds: float) -> None:
        self._results.append(result)
        self._durations.append(seconds)

    def report(self, step: int, total_steps: int | None, seconds: float, memory_bytes: int) -> Trained:
        n = len(self._results)
        rate = len(self._durations) * self.tokens_per_step / sum(self._durations)
        trained = Trained(
            step=step,
            total_steps=total_steps,
            tokens=step * self.tokens_per_step,
            loss=sum(result.loss for result in self._results) / n,
            grad_norm=sum(result.grad_norm for result in self._results) / n,
            lr=self._results[-1].learning_rate,
            tokens_per_second=rate,
            mfu=rate * self.flops_per_token / self.peak_flops,
            seconds=seconds,
            memory_bytes=memory_bytes,
            balance_loss=_mean([result.balance_loss for result in self._results]),
        )
        self._results, self._durations = [], []
        return trained


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
