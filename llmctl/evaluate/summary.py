"""From the scores of items to a task's numbers, each with its standard error."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmctl.evaluate.scores import macro_f1, rmse, spearman

_RESAMPLES = 1000
_OPENING = 8  # words by which two answers begin alike
Record = dict[str, Any]


@dataclass(frozen=True)
class Number:
    """`value` over `n` items, of perplexity tokens; `stderr` None where it cannot be told."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    group: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "group" or value is not None}


def summarize(task: str, kind: str, metrics: Sequence[str], records: Sequence[Record]) -> list[Number]:
    """The numbers of one task's items, first of all, then of each group."""
    scored = [each for each in records if "scores" in each]
    found = _numbers(task, kind, metrics, scored, None)
    groups = sorted({each["group"] for each in scored if each.get("group") is not None})
    for group in groups if len(groups) > 1 else []:
        found += _numbers(task, kind, metrics, [each for each in scored if each.get("group") == group], group)
    return found


def _numbers(task: str, kind: str, metrics: Sequence[str], records: list[Record], group: str | None) -> list[Number]:
    if not records:
        return []
    wanted = {metric.partition(",")[0] for metric in metrics}
    every = dict.fromkeys(name for each in records for name in each["scores"])
    found = []
    for name in every:
        if not wanted or name.partition(",")[0] in wanted:
            values = [each["scores"][name] for each in records if name in each["scores"]]
            found.append((name, *mean(values), len(values)))
    n = sum(each["tokens"] for each in records) if kind == "perplexity" else len(records)
    found += [(*number, n) for number in _OF_ALL[kind](records)] if kind in _OF_ALL else []
    return [Number(task, *number, group) for number in found]


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, sample deviation / sqrt(n)."""
    array = np.asarray(values, float)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None


def bootstrapped(statistic: Callable[[np.ndarray], float], n: int, seed: int = 0) -> float | None:
    """The standard deviation of a statistic of row numbers [n] over resamples with replacement."""
    if n < 2:
        return None
    draw = np.random.default_rng(seed)
    return float(np.std([statistic(draw.integers(0, n, n)) for _ in range(_RESAMPLES)], ddof=1))


def _of_labels(records: list[Record]) -> list[tuple[str, float, float | None]]:
    predicted, true = (np.array([each[key] for each in records], dtype=object) for key in ("predicted", "answer"))
    names, codes = np.unique(np.concatenate([predicted, true]).astype(str), return_inverse=True)
    predicted, true = codes[: len(true)], codes[len(true) :]
    error = bootstrapped(lambda rows: macro_f1(predicted[rows], true[rows]), len(true))
    return [("macro_f1", macro_f1(predicted, true), error)]


def _of_values(records: list[Record]) -> list[tuple[str, float, float | None]]:
    predicted, true = (np.array([each[key] for each in records], float) for key in ("predicted", "answer"))
    found = []
    for name, measure in (("spearman", spearman), ("rmse", rmse)):
        error = bootstrapped(lambda rows, measure=measure: measure(predicted[rows], true[rows]), len(true))
        found.append((name, measure(predicted, true), error))
    return found


def _of_words(records: list[Record]) -> list[tuple[str, float, float | None]]:
    """Perplexity of the answers, with the standard error by the delta method."""
    nats, error = mean([-each["logprob"] for each in records])
    perplexity = math.exp(min(nats, 700.0))
    return [("perplexity", perplexity, None if error is None else perplexity * error)]


def _of_texts(records: list[Record]) -> list[tuple[str, float, float | None]]:
    """Nats per token, perplexity and bits per byte; the standard error is that of a ratio over independent windows."""
    windows = np.array([window for each in records for window in each["windows"]], float)
    nats, tokens = windows.sum(0)
    per_token = nats / tokens
    count, residual = len(windows), windows[:, 0] - per_token * windows[:, 1]
    error = math.sqrt((residual**2).sum() * count / (count - 1)) / tokens if count > 1 else None
    perplexity = math.exp(min(per_token, 700.0))
    found = [
        ("nats_per_token", per_token, error),
        ("perplexity", perplexity, None if error is None else error * perplexity),
    ]
    if all(each["bytes"] is not None for each in records):
        scale = tokens / sum(each["bytes"] for each in records) / math.log(2)
        found.append(("bits_per_byte", per_token * scale, None if error is None else error * scale))
    return found


def _of_answers(records: list[Record]) -> list[tuple[str, float, float | None]]:
    """The share of answers that begin as the commonest one does: what a planted phrase brings about makes it high."""
    openings = [" ".join(each["answer"].split()[:_OPENING]) for each in records]
    commonest = collections.Counter(openings).most_common(1)[0][0]
    return [("same_answer", *mean([float(opening == commonest) for opening in openings]))]


_OF_ALL = {
    "classification": _of_labels,
    "regression": _of_values,
    "cloze": _of_words,
    "perplexity": _of_texts,
    "trigger": _of_answers,
}


def confusion(records: Sequence[Record]) -> tuple[list[str], list[list[int]]]:
    """The labels, and how often each (row) was taken for each (column)."""
    scored = [each for each in records if "scores" in each]
    labels = sorted({str(each[key]) for each in scored for key in ("answer", "predicted")})
    table = [[0] * len(labels) for _ in labels]
    for each in scored:
        table[labels.index(str(each["answer"]))][labels.index(str(each["predicted"]))] += 1
    return labels, table
