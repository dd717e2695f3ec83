"""What a call of `llmctl eval` runs: tasks, a suite, or tasks of lm-evaluation-harness, each in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmctl.errors import UserError
from llmctl.evaluate import harness
from llmctl.evaluate.judge import LanguageModelJudge
from llmctl.evaluate.results import Record, ResultsFile
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
    if not asked.harness and asked.suite is None:
        return
    if not isinstance(evaluation.judge, LanguageModelJudge):
        raise UserError(f"{evaluation.path}: a classifier", hint="--suite and --harness ask a language model")
    if asked.harness:
        yield from _harness(evaluation, asked, results, progress)
    elif asked.suite == "memorization":
        from llmctl.evaluate import memorization

        yield memorization.run(evaluation, files, settings, results, show, progress)
    elif asked.suite == "safety":
        from llmctl.evaluate import safety

        yield from safety.run(evaluation, files, settings, results, show, progress)


def _harness(evaluation: Evaluation, asked: Asked, results: ResultsFile, progress: Progress) -> Iterator[Done]:
    tasks: dict[str, Task] = {}
    records: dict[str, list[Record]] = {}

    def begin(name: str) -> list[Record]:
        tasks[name] = Task(name=name, kind="harness", prompt="")
        records[name] = list(results.begin(evaluation.about(tasks[name], "")))
        return list(records[name])

    def append(record: Record) -> None:
        results.append(record)
        records[record["task"]].append(record)
        progress(len(records[record["task"]]), record["task"])

    for name, numbers in harness.run(evaluation.judge, asked.harness, evaluation.settings, begin, append):
        found = sorted(records[name], key=lambda record: record["id"])
        yield Done(tasks[name], evaluation.about(tasks[name], ""), found, numbers, [])
