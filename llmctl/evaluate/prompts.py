"""From rows to what a model reads: description, examples and question, as plain text or as a chat."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmctl.errors import UserError
from llmctl.evaluate import templates
from llmctl.evaluate.rows import DataRow
from llmctl.evaluate.task import Task
from llmctl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    """A row as it is asked. `answer` is an index of `choices` where there are such, else what the task file says.

    Each of `contexts` is followed by the continuation of its number in `continuations`; all contexts are the same text
    where only the continuations differ.
    """

    number: int
    place: str
    contexts: list[str]
    continuations: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    answer: Any = None
    group: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Style:
    """How prompts are put together. `seed` draws the examples; a `system` text comes before the description."""

    num_fewshot: int | None = None
    seed: int = 1234
    chat: bool = False
    multiturn: bool = True
    system: str = ""


class Prompter:
    """Makes items of a task's rows; `pool` are rows that examples come from, None for the task's own."""

    def __init__(self, task: Task, style: Style, tokenizer: Tokenizer | None, pool: Sequence[DataRow] | None = None):
        self.task, self.style, self._tokenizer, self._pool = task, style, tokenizer, pool
        self.num_fewshot = task.num_fewshot if style.num_fewshot is None else style.num_fewshot

    def items(self, rows: Sequence[DataRow]) -> Iterator[Item]:
        """One for each row, in their order: the examples of a row depend on those drawn for the rows before it."""
        draw = _Examples(self.task, self._pool, rows, self.style.seed)
        for row in rows:
            yield self._item(row, draw.of(row, self.num_fewshot) if self.num_fewshot else [])

    def _item(self, row: DataRow, examples: list[DataRow]) -> Item:
        task, fields, place = self.task, row.fields, row.place
        choices, answer = _question(task, row)
        before = [self._turn(each) for each in examples]
        questions = [templates.text(task.prompt, fields, place)] if task.continuation is None else choices
        contexts = [self._context(before, question, row) for question in questions]
        delimiter = "" if self.style.chat else task.delimiter
        if task.continuation is not None:
            continuations = [delimiter + templates.text(task.continuation, fields, place)] * len(choices)
        elif task.kind == "cloze":
            continuations = [str(answer)]
        elif task.kind == "preference":
            continuations = [delimiter + templates.text(each, fields, place) for each in (task.chosen, task.rejected)]
        else:
            continuations = [delimiter + choice for choice in choices]
        contexts = contexts * len(continuations) if len(contexts) == 1 and continuations else contexts
        group = None if task.group is None else templates.text(task.group, fields, place)
        return Item(row.number, place, contexts, continuations, choices, answer, group, fields)

    def _turn(self, row: DataRow) -> tuple[str, str]:
        """A question and its answer, as an example shows them."""
        task = self.task
        choices, answer = _question(task, row)
        if task.continuation is not None:
            return choices[answer], templates.text(task.continuation, row.fields, row.place)
        question = templates.text(task.prompt, row.fields, row.place)
        if task.kind == "preference":
            return question, templates.text(task.chosen, row.fields, row.place)
        if choices:
            return question, choices[answer if isinstance(answer, int) else answer.index(1)]
        if isinstance(answer, (list, tuple)):
            return question, str(answer[0]) if answer else "unanswerable"
        if answer is None:
            raise UserError(f"task {task.name}: has no answers, so there are no examples to show")
        return question, str(answer)

    def _context(self, before: list[tuple[str, str]], question: str, row: DataRow) -> str:
        task, style = self.task, self.style
        description = templates.text(task.description, row.fields, row.place)
        system = _joined(style.system, description, task.fewshot.delimiter)
        gap = "" if task.kind == "cloze" else task.delimiter
        shown = [f"{asked}{gap}{answer}" for asked, answer in before]
        if not style.chat:
            return system + "".join(each + task.fewshot.delimiter for each in shown) + question
        messages = [{"role": "system", "content": system}] if system else []
        if style.multiturn:
            for asked, answer in before:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            messages.append({"role": "user", "content": question})
        else:
            text = "".join(each + task.fewshot.delimiter for each in shown) + question
            messages.append({"role": "user", "content": text})
        return self._tokenizer.render_chat(messages, add_generation_prompt=True).text


class _Examples:
    """Draws rows as lm-evaluation-harness does, so that the same seed shows the same examples."""

    def __init__(self, task: Task, pool: Sequence[DataRow] | None, own: Sequence[DataRow], seed: int):
        self._task, self._is_own, self._seed = task, pool is None, seed
        self._pools: dict[str | None, list[DataRow]] = {}
        for row in own if pool is None else pool:
            self._pools.setdefault(self._key(row), []).append(row)
        self._random: dict[str | None, random.Random] = {}

    def of(self, row: DataRow, count: int) -> list[DataRow]:
        key = self._key(row)
        pool = self._pools.get(key, [])
        if len(pool) < count + self._is_own:
            raise UserError(
                f"{row.place}: {count} examples were asked for, there are {max(0, len(pool) - self._is_own)}"
                + (f" of {key}" if key else ""),
                hint="lower --num-fewshot, or give more with --fewshot-data",
            )
        if self._task.fewshot.sampler == "first":
            return list(itertools.islice(self._others(row, pool), count))
        draw = self._random.setdefault(key, random.Random(self._seed))
        # One more than asked for, in case the row itself is among them.
        found = list(self._others(row, draw.sample(pool, count + self._is_own)))[:count]
        return found if len(found) == count else draw.sample(list(self._others(row, pool)), count)

    def _others(self, row: DataRow, rows: Sequence[DataRow]) -> Iterator[DataRow]:
        return (each for each in rows if not self._is_own or each.fields != row.fields)

    def _key(self, row: DataRow) -> str | None:
        match = self._task.fewshot.match
        return None if match is None else templates.text(match, row.fields, row.place)


def _question(task: Task, row: DataRow) -> tuple[list[str], Any]:
    """The choices, and the answer as an index of them. Raises UserError for an answer that is none of them."""
    answer = None if task.answer is None else templates.value(task.answer, row.fields, row.place)
    if task.choices is None:
        return [], answer
    found = templates.value(task.choices, row.fields, row.place)
    if isinstance(found, (str, Mapping)) or not isinstance(found, Iterable) or not found:
        raise UserError(f"{row.place}: the choices are {found!r}"[:300], hint="expected a list of at least one")
    choices = [str(each) for each in found]
    if isinstance(answer, (list, tuple)):
        if len(answer) != len(choices):
            raise UserError(f"{row.place}: {len(answer)} labels for {len(choices)} choices")
        if 1 not in answer:
            raise UserError(f"{row.place}: the labels {answer!r} mark no choice as right (1)")
        return choices, list(answer)
    index = _index(answer, choices)
    if index is None:
        raise UserError(
            f"{row.place}: the answer {answer!r} is none of the choices",
            hint=f"expected 0 to {len(choices) - 1}, or one of {', '.join(map(repr, choices))}"[:300],
        )
    return choices, index


def _index(answer: Any, choices: list[str]) -> int | None:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    try:
        number = int(answer)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(answer, float) and number != answer:
        return None
    return number if 0 <= number < len(choices) else None


def _joined(first: str, second: str, delimiter: str) -> str:
    if not first or not second or first[-1].isspace() or second[0].isspace():
        return first + second
    return first + delimiter + second
