"""Whether two models differ on the same items: paired tests."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmctl.errors import UserError
from llmctl.evaluate import results
from llmctl.evaluate.results import Section

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Compared:
    """One metric of one task on the `n` items that both have.

    `only_first` and `only_second` count the items that one alone has right, for a metric of right and wrong; else None.
    `mcnemar_p` is McNemar's exact two-sided test of these, `bootstrap_p` and the interval `low` to `high` (95 %) of
    `difference` (first - second) come from resampling items in pairs.
    """

    task: str
    metric: str
    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    bootstrap_p: float
    only_first: int | None = None
    only_second: int | None = None
    mcnemar_p: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(first_path: str, second_path: str, seed: int = 0) -> list[Compared]:
    """Every metric of every task that both files have. Raises UserError where they share no items or asked otherwise."""
    first, second = ({each.task: each for each in results.read(path)} for path in (first_path, second_path))
    common = [task for task in first if task in second]
    if not common:
        raise UserError(
            f"{first_path} and {second_path} share no task",
            hint=f"the one has {', '.join(first)}, the other {', '.join(second)}",
        )
    found = []
    for task in common:
        _refuse_other_questions(first[task], second[task], first_path, second_path)
        found += _compare_task(task, first[task], second[task], seed)
    if not found:
        raise UserError(f"{first_path} and {second_path} share no item with a score")
    return found


def _refuse_other_questions(first: Section, second: Section, *paths: str) -> None:
    for key in ("task_sha256", "data_sha256"):
        if first.run.get(key) != second.run.get(key):
            raise UserError(
                f"{first.task}: {paths[0]} and {paths[1]} come from different {key.partition('_')[0]}s",
                hint="a paired test needs the same questions asked of both",
            )


def _compare_task(task: str, first: Section, second: Section, seed: int) -> list[Compared]:
    ours, theirs = ({each["id"]: each for each in results.items(part)} for part in (first, second))
    shared = sorted(ours.keys() & theirs.keys())
    for number in shared:
        sizes = [each[number].get("bytes") for each in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{task}: item {number} is a text of {sizes[0]} bytes in the one and of {sizes[1]} in the other",
                hint="texts in many windows are cut by --window, --stride and the tokenizer, which must be the same",
            )
    ours, theirs = ({number: _scores(each[number]) for number in shared} for each in (ours, theirs))
    metrics = [name for name in ours[shared[0]] if name in theirs[shared[0]]] if shared else []
    found = []
    for metric in metrics:
        pairs = [(ours[i][metric], theirs[i][metric]) for i in shared if metric in ours[i] and metric in theirs[i]]
        found.append(_compare_values(task, metric, *np.array(pairs, float).T, seed))
    return found


def _scores(record: dict[str, Any]) -> dict[str, float]:
    """Of a text its bits per byte stand for a score: tokens are not alike in all models."""
    if "nats" in record:
        return {"bits_per_byte": record["nats"] / math.log(2) / max(record["bytes"] or record["tokens"], 1)}
    return record["scores"]


def _compare_values(task: str, metric: str, first_N: np.ndarray, second_N: np.ndarray, seed: int) -> Compared:
    difference_N = first_N - second_N
    means = _resampled_means(difference_N, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    # how often chance alone would turn the sign, on both sides; never less than the resamples can tell
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    p = max(min(1.0, 2 * float(beyond)), 1 / _RESAMPLES)
    counts: dict[str, Any] = {}
    if set(np.unique(np.concatenate([first_N, second_N]))) <= {0.0, 1.0}:
        one, other = int((difference_N > 0).sum()), int((difference_N < 0).sum())
        counts = {"only_first": one, "only_second": other, "mcnemar_p": mcnemar(one, other)}
    n = len(difference_N)
    means = float(first_N.mean()), float(second_N.mean()), float(difference_N.mean())
    return Compared(task, metric, n, *means, float(low), float(high), p, **counts)


def _resampled_means(values_N: np.ndarray, seed: int) -> np.ndarray:
    """float64 [_RESAMPLES]: means of as many values, drawn with replacement."""
    draw, n = np.random.default_rng(seed), len(values_N)
    step = max(1, (1 << 22) // n)
    parts = [
        values_N[draw.integers(0, n, (min(step, _RESAMPLES - at), n))].mean(1) for at in range(0, _RESAMPLES, step)
    ]
    return np.concatenate(parts)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p: both sides are as likely as the other where neither model is better (binomial, 1/2)."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * sum(map(math.exp, logs)))
