"""How long a run is: a budget of time becomes a number of steps, once."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from llmctl.train.plan import Plan

DEFAULT_SECONDS = 600.0

TIMED_EPOCHS, TIMED_STEPS = 4, 200
"""A time budget ends no later than after so many passes over the corpus, or so many steps where a pass is short: beyond
four passes repeated data is worth little (arXiv:2305.16264), and a small model soon learns it by heart."""

SECONDS_TO_FINISH = 1.5
"""Of a time budget, kept back for the last save and the exit."""

VALIDATION_SHARE = 0.05
"""Of the run's time, what the validations during it may take. A forward pass costs a third of a step per token."""

log = logging.getLogger("llmctl")


def seconds_per_step(durations: Sequence[float], budget: float) -> float | None:
    """The steps' usual length once enough were seen: the first is left out, which is slower than those that follow."""
    measured = sorted(durations[1:])
    enough = len(measured) >= 5 and sum(measured) >= min(2.0, 0.05 * budget)
    if not enough and not (measured and sum(durations) >= 0.1 * budget):
        return None
    return measured[len(measured) // 2]


def steps_in_time(seconds: float, per_step: float, plan: Plan, done: int, n_val_tokens: int) -> int:
    """The length of a run of which `done` steps are behind and so many seconds are left, beside validations and the end."""
    left = seconds - SECONDS_TO_FINISH
    if n_val_tokens:
        left -= per_step * n_val_tokens / plan.tokens_per_step / 3
        left /= 1 + VALIDATION_SHARE
    fitting = done + max(1, int(left / per_step))
    useful = max(TIMED_STEPS, TIMED_EPOCHS * plan.rows_per_epoch // plan.batch_size)
    if fitting > useful:
        log.info("%d steps are enough for this corpus, less than the time would allow; --epochs goes on", useful)
    return min(fitting, useful)


def validation_interval(total_steps: int, tokens_per_step: int, n_val_tokens: int) -> int:
    """Steps between ten validations a run, or fewer where those would cost more than their share."""
    affordable = VALIDATION_SHARE * 3 * total_steps * tokens_per_step / n_val_tokens
    return math.ceil(total_steps / max(1, min(10, int(affordable))))
