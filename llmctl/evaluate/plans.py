"""Which tasks a call of `llmctl eval` names, and the data of each."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from llmctl.errors import CalledWrongly
from llmctl.evaluate import harness, perplexity, task
from llmctl.evaluate.settings import Asked, EvalSettings
from llmctl.evaluate.task import Task
from llmctl.files import refuse_existing, refuse_input


def tasks_of(asked: Asked, files: Sequence[str]) -> list[Task]:
    """The tasks of --task; without any, the perplexity of the files. Raises CalledWrongly for what cannot be meant."""
    if asked.suite or asked.harness:
        if asked.suite and (asked.task or asked.harness):
            raise CalledWrongly("--suite runs by itself", hint="run it apart from --task and --harness")
        if asked.harness:
            harness.require()
        if not asked.task:
            return []
    words = asked.task or ("perplexity",)
    found = [_find(word) for word in words]
    if len({each.name for each in found}) < len(found):
        raise CalledWrongly("a task is named twice")
    lacking = [number for number, each in enumerate(found) if each.data is None]
    if not files:
        return found
    if len(lacking) != 1 and len(found) != 1:
        raise CalledWrongly(
            f"{len(lacking)} tasks need data: which does {files[0]} belong to?", hint="--task NAME=DATA says it"
        )
    place = lacking[0] if lacking else 0
    if found[place].kind != "perplexity" and len(files) > 1:
        raise CalledWrongly(
            f"{found[place].name} reads one file, got {len(files)}", hint="a directory may hold several"
        )
    found[place] = dataclasses.replace(found[place], data="\n".join(files))
    return found


def check_output(
    output: str | None, settings: EvalSettings, model: str | os.PathLike, files: Sequence[str], tasks: Sequence[Task]
) -> None:
    """Raises CalledWrongly, before a model is loaded, for an output that exists or that would replace what is read."""
    if output is None:
        return
    if not settings.resume:
        refuse_existing(output, settings.overwrite)
    beside = [
        settings.fewshot_data,
        settings.reward,
        *(path for each in tasks for path in (each.data, each.fewshot.data)),
    ]
    read = [*files, *(part for path in beside if path for part in path.split("\n"))]
    refuse_input(output, [model, *(path for path in read if path != "-")])


def _find(word: str) -> Task:
    name, _, data = word.partition("=")
    if name == "perplexity":
        return dataclasses.replace(perplexity.TASK, data=data or None)
    return task.find(word)
