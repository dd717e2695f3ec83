"""Items of a run of lm-evaluation-harness, each scored by the harness' own code as soon as its last response is there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmctl.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Record = dict[str, Any]


class HarnessItems:
    """Between the harness, which asks for all responses at once, and a results file, which gets item by item.

    `begin` is called with a task's name before its first item and gives the records of a run that was stopped, whose
    responses are not asked for again; `append` gets each new record. `manager` has loaded the tasks by then.
    """

    def __init__(self, manager: TaskManager, begin: Callable[[str], list[Record]], append: Callable[[Record], None]):
        self._manager, self._begin, self._append = manager, begin, append
        self._instances: dict[tuple[str, int], list[Instance]] = {}
        self._responses: dict[int, list[Any]] = {}  # by the identity of an instance: one for each time that it is asked
        self._done: dict[tuple[str, int], Record] = {}
        self._tasks: dict[str, Task] = {}

    def answered(
        self, requests: Sequence[Instance], work: Callable[[Sequence[tuple]], Iterator[tuple[int, Any]]]
    ) -> list[Any]:
        """The responses to requests. `work` is given the arguments of those that are new, and gives in any order the place
        of each with its response."""
        for name in dict.fromkeys(each.task_name for each in requests):
            self._open(name)
        found = [self._kept(each) for each in requests]
        new = [place for place, response in enumerate(found) if response is None]
        for place, response in work([requests[place].args for place in new]):
            found[new[place]] = response
            self._note(requests[new[place]], response)
        return found

    def _open(self, name: str) -> None:
        if name in self._tasks:
            return
        task = self._tasks[name] = self._manager.loaded["tasks"][name]
        for each in task.instances:
            self._instances.setdefault((name, each.doc_id), []).append(each)
        for record in self._begin(name):
            asked = self._instances.get((name, record["id"]))
            if asked is None:  # of a run with a higher limit
                continue
            if record.get("asked_sha256") != _sha256(asked):
                raise UserError(
                    f"the item {record['id']} of {name} was asked something else in the run that was stopped",
                    hint="choose another --output, or add --overwrite to begin again",
                )
            self._done[name, record["id"]] = record
            for each, responses in zip(_in_order(asked), record["responses"], strict=True):
                self._responses[id(each)] = [_as_given(response) for response in responses]

    def _kept(self, instance: Instance) -> Any:
        """The response to an item of the run that was stopped; the next one each time. None for an item that is new."""
        if (instance.task_name, instance.doc_id) not in self._done:
            return None
        responses = self._responses[id(instance)]
        responses.append(responses.pop(0))
        return responses[-1]

    def _note(self, instance: Instance, response: Any) -> None:
        self._responses.setdefault(id(instance), []).append(response)
        item = (instance.task_name, instance.doc_id)
        instances = _in_order(self._instances[item])
        responses = [self._responses.get(id(each), []) for each in instances]
        if any(len(given) < (each.repeats or 1) for each, given in zip(instances, responses)):
            return
        name, number = item
        record = {"task": name, "id": number, "scores": _scores(self._tasks[name], instances, responses)}
        listed = [[list(each) if isinstance(each, tuple) else each for each in given] for given in responses]
        self._append({**record, "responses": listed, "asked_sha256": _sha256(instances)})


def _in_order(instances: Sequence[Instance]) -> list[Instance]:
    return sorted(instances, key=lambda each: each.idx)


def _scores(task: Task, instances: Sequence[Instance], responses: Sequence[list[Any]]) -> dict[str, float]:
    """As the harness scores an item: each of the task's filters over its responses, and the task's metrics of that."""
    copies = [
        dataclasses.replace(each, resps=list(given), filtered_resps={})
        for each, given in zip(instances, responses, strict=True)
    ]
    for ensemble in task._filters:
        ensemble.apply(copies)
    scores = {}
    for key in copies[0].filtered_resps:
        end = "" if key == "none" else f",{key}"
        metrics = task.process_results(copies[0].doc, [each.filtered_resps[key] for each in copies])
        for metric, value in metrics.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                scores[metric + end] = float(value)
    return scores


def _as_given(response: Any) -> Any:
    """JSON has lists for tuples."""
    return tuple(response) if isinstance(response, list) else response


def _sha256(instances: Sequence[Instance]) -> str:
    asked = json.dumps([each.args for each in _in_order(instances)], default=str)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]
