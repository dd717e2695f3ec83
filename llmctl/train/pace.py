"""Steps and seconds: when something is due, how fast the run goes, and how many steps fit into a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import astuple

from llmctl.train import distributed
from llmctl.train.events import Trained
from llmctl.train.loop import StepResult

SECONDS_TO_FINISH = 1.5
"""Of a time budget, kept back for the last save and the exit."""

VALIDATION_SHARE = 0.05
"""Of the run's time, what the validations during it may take. A forward pass costs a third of a step per token."""


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
        )
        self._results, self._durations = [], []
        return trained


def seconds_per_step(durations: Sequence[float], budget: float) -> float | None:
    """The steps' usual length once enough were seen: the first is left out, which is slower than those that follow."""
    measured = sorted(durations[1:])
    enough = len(measured) >= 5 and sum(measured) >= min(2.0, 0.05 * budget)
    if not enough and not (measured and sum(durations) >= 0.1 * budget):
        return None
    return measured[len(measured) // 2]


def steps_in(seconds: float, per_step: float, tokens_per_step: int, n_val_tokens: int) -> int:
    """Steps, at least 1, that fit into the rest of a time budget beside the validations and the end."""
    left = seconds - SECONDS_TO_FINISH
    if n_val_tokens:
        left -= per_step * n_val_tokens / tokens_per_step / 3
        left /= 1 + VALIDATION_SHARE
    return max(1, int(left / per_step))


def validation_interval(total_steps: int, tokens_per_step: int, n_val_tokens: int) -> int:
    """Steps between ten validations a run, or fewer where those would cost more than their share."""
    affordable = VALIDATION_SHARE * 3 * total_steps * tokens_per_step / n_val_tokens
    return math.ceil(total_steps / max(1, min(10, int(affordable))))
