"""Items through a classifier: its labels, values and rewards against what the task says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmctl.classify import TextClassifier
from llmctl.data.text_rows import TextRow
from llmctl.errors import UserError
from llmctl.evaluate.judging import classified, compared, measured
from llmctl.evaluate.prompts import Item
from llmctl.evaluate.task import Task

Record = dict[str, Any]


class ClassifierJudge:
    """For a model with a head of labels (classification), one value (regression) or a reward (preference, reward)."""

    def __init__(self, classifier: TextClassifier):
        self.classifier, self._spec = classifier, classifier.model.config.classifier

    def run(self, task: Task, items: Iterable[Item]) -> Iterator[Record]:
        is_value = self._spec.kind == "regression" and len(self._spec.labels) == 1
        kinds = ("regression", "preference", "reward") if is_value else ("classification",)
        if task.kind not in kinds:
            raise UserError(
                f"task {task.name} is of kind {task.kind}; this classifier ({self._spec.kind}) does {', '.join(kinds)}",
                hint="give a language model, or another task",
            )
        pending: list[tuple[Item, list[Any]]] = []

        def rows() -> Iterator[TextRow]:
            for item in items:
                pending.append((item, []))
                continuations = item.continuations if task.kind == "preference" else [""]
                for number, continuation in enumerate(continuations):
                    yield TextRow(item.contexts[0] + continuation, item.place, {"of": len(continuations) - number})

        for row, said in self.classifier.classify(rows()):
            item, found = pending[0]
            found.append(said["predicted"])
            if row.rest["of"] == 1:
                pending.pop(0)
                group = {} if item.group is None else {"group": item.group}
                yield {"task": task.name, "id": item.number, **group, **self._judged(task, item, found)}

    def reward(self, prompt: str, text: str) -> float:
        """Of a text that follows a prompt."""
        ((_, said),) = self.classifier.classify([TextRow(prompt + text, "a generated text", {})])
        return float(said["predicted"])

    def _judged(self, task: Task, item: Item, found: list[Any]) -> Record:
        if task.kind == "preference":
            return compared(*found)
        if task.kind == "reward":
            return {"scores": {"reward": found[0]}}
        if task.kind == "regression":
            return measured(item, found[0])
        label = item.choices[item.answer] if item.choices else str(item.answer)
        if label not in self._spec.labels:
            raise UserError(
                f"{item.place}: the answer {label!r} is no label of the model",
                hint=f"its labels are {', '.join(self._spec.labels)}"[:300],
            )
        predicted = found[0] if isinstance(found[0], str) else " ".join(sorted(found[0]))
        return classified(item, predicted, label)
