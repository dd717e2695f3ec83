"""How results of `llmctl eval` look: JSON Lines on standard output, tables for a person on standard error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmctl import ui

if TYPE_CHECKING:
    from llmctl.evaluate.comparison import Compared
    from llmctl.evaluate.run import Done
    from llmctl.evaluate.summary import Number
    from llmctl.evaluate.task import Task


def show_numbers(title: str, numbers: Iterable[Number], as_json: bool, **about: Any) -> None:
    """A line each; `about` goes into every line of JSON."""
    numbers = list(numbers)
    for number in numbers if as_json else []:
        ui.print_data(json.dumps({**about, **number.as_dict()}, ensure_ascii=False))
    has_groups = any(number.group is not None for number in numbers)
    columns = ["task", *(["group"] if has_groups else []), "metric", "value", "± standard error", "n"]
    rows = []
    for number in numbers:
        error = "" if number.stderr is None else _short(number.stderr)
        group = [number.group or ""] if has_groups else []
        rows.append([number.task, *group, number.metric, _short(number.value), error, number.n])
    ui.table(title, columns, rows)


def show_done(done: Done, as_json: bool) -> None:
    """The numbers of a task, what was left out, and of labels how they were mixed up."""
    from llmctl.evaluate.summary import confusion

    for note in done.notes:
        ui.message(f"warning: {done.task.name}: {note}")
    show_numbers(f"{done.run['model']}", done.numbers, as_json, model=done.run["model"])
    if done.task.kind == "classification" and done.numbers:
        labels, table = confusion(done.records)
        if len(labels) <= 20:
            rows = [[label, *counts] for label, counts in zip(labels, table)]
            ui.table("true (rows) taken for (columns)", ["", *labels], rows)
        if as_json:
            matrix = {"task": done.task.name, "metric": "confusion", "labels": labels, "counts": table}
            ui.print_data(json.dumps({"model": done.run["model"], **matrix}, ensure_ascii=False))


def show_comparison(found: Iterable[Compared], names: tuple[str, str], as_json: bool) -> None:
    rows = []
    for each in found:
        if as_json:
            ui.print_data(json.dumps({"first_file": names[0], "second_file": names[1], **each.as_dict()}))
        mcnemar = "" if each.mcnemar_p is None else f"{each.mcnemar_p:.3g} ({each.only_first} : {each.only_second})"
        interval = f"{_short(each.low)} to {_short(each.high)}"
        values = [each.n, _short(each.first), _short(each.second), _short(each.difference), interval]
        rows.append([each.task, each.metric, *values, f"{each.bootstrap_p:.3g}", mcnemar])
    columns = ["task", "metric", "items", "first", "second", "difference", "95 %", "bootstrap p"]
    columns.append("McNemar p (only first : second)")
    ui.table(f"first: {names[0]}, second: {names[1]}", columns, rows)


def show_tasks(tasks: Iterable[Task], as_json: bool) -> None:
    tasks = list(tasks)
    for task in tasks if as_json else []:
        keys = {"task": task.name, "kind": task.kind, "metrics": list(task.metrics), "num_fewshot": task.num_fewshot}
        ui.print_data(json.dumps({**keys, "about": task.about}, ensure_ascii=False))
    rows = [[task.name, task.kind, ", ".join(task.metrics), task.num_fewshot, task.about] for task in tasks]
    ui.table("tasks", ["name", "kind", "metrics", "examples", "what, and the file that it reads"], rows)


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"
