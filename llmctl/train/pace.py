"""Steps and seconds: when something is due, how fast the run goes, and how many steps fit into a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

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
        self._busy = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        self._results.append(result)
        self._busy += seconds

    def report(self, step: int, total_steps: int | None, seconds: float, memory_bytes: int) -> Trained:
        n = len(self._results)
        rate = n * self.tokens_per_step / self._busy
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
        self._results, self._busy = [], 0.0
        return trained


def seconds_per_step(durations: Sequence[float], budget: float) -> float | None:
    """The steps' usual length once enough were seen: the first is left out, which is slower than those that follow."""
    measured = sorted(durations[1:])
    enough = len(measured) >= 5 and sum(measured) >= min(2.0, 0.05 * budget)
    if not enough and not (measured and sum(durations) >= 0.1 * budget):
        return None
    return measured[len(measured) // 2]
