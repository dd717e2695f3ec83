"""What a call of `llmctl eval` runs: tasks, a suite, or tasks of lm-evaluation-harness, each in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmctl.evaluate.results import ResultsFile
from llmctl.evaluate.run import Done, Evaluation, Progress
from llmctl.evaluate.settings import Asked, SuiteSettings
from llmctl.evaluate.task import Task


def run(
    evaluation: Evaluation,
    asked: Asked,
    settings: SuiteSettings,
    files: list[str],
    tasks: list[Task],
    results: ResultsFile,
    show: Callable[[str], None],
    progress: Progress,
) -> Iterator[Done]:
    """What each part came to, as soon as it is done."""
    for task in tasks:
        yield evaluation.run(task, results, show, progress)
