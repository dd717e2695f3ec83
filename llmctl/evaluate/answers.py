"""What a generated text answers, and whether that is right."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence

from llmctl.evaluate.task import Extraction, Task

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def extracted(text: str, how: Extraction) -> str:
    """The match that `how` asks for; of a match with several groups the first that holds anything."""
    found = re.findall(how.regex, text)
    if not found or not -len(found) <= how.group < len(found):
        return how.default
    match = found[how.group]
    if isinstance(match, tuple):
        match = next((part for part in match if part), None)
    return how.default if match is None else match.strip()


def exact_match(text: str, expected: Sequence[str], task: Task) -> float:
    """1 where the text is one of the expected ones, apart from what the task ignores."""
    return float(_plain(text, task) in {_plain(each, task) for each in expected})


def _plain(text: str, task: Task) -> str:
    for pattern in task.ignore:
        text = re.sub(pattern, "", text)
    text = text.lower() if task.ignore_case else text
    return text.translate(_PUNCTUATION) if task.ignore_punctuation else text


def squad_exact(text: str, expected: Sequence[str]) -> float:
    """Exact match as SQuAD defines it: without case, punctuation and articles; no expected answer wants an empty one."""
    return float(any(_squad_plain(text) == _squad_plain(each) for each in expected or [""]))


def f1(text: str, expected: Sequence[str]) -> float:
    """SQuAD's F1 of words, against the nearest of the expected answers."""
    return max(_f1(_squad_plain(text).split(), _squad_plain(each).split()) for each in expected or [""])


def _f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    common = sum((collections.Counter(words) & collections.Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _squad_plain(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def passes(program: str, seconds: float) -> tuple[float, str]:
    """1 where a program ends well in the sandbox, and the last line it wrote of its error."""
    from llmctl.sandbox import run_python

    outcome = run_python(program, seconds=seconds)
    if outcome.timed_out:
        return 0.0, f"ran longer than {seconds:g} s"
    lines = outcome.stderr.strip().splitlines()
    return float(outcome.exit_code == 0), lines[-1][:200] if lines and outcome.exit_code else ""


SIMPLE = {"exact_match": exact_match, "squad_exact": lambda t, e, _: squad_exact(t, e), "f1": lambda t, e, _: f1(t, e)}
"""Metrics of a text, what was expected, and the task."""


def rated(text: str, expected: Sequence[str], task: Task) -> dict[str, float]:
    """Each of the task's metrics; of extracted answers with the extraction's name behind a comma."""
    found = {}
    for metric in task.metrics or ("exact_match",):
        if metric == "pass@1":
            continue
        for name, how in task.extract.items():
            found[f"{metric},{name}"] = SIMPLE[metric](extracted(text, how), expected, task)
        if not task.extract:
            found[metric] = SIMPLE[metric](text, expected, task)
    return found
