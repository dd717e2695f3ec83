"""Items through a language model: likelihoods or generated texts, in batches, each item judged as soon as it is done."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llmctl.errors import UserError
from llmctl.evaluate.batches import plan
from llmctl.evaluate.encoding import PairEncoder
from llmctl.evaluate.judging import judged, judged_text
from llmctl.evaluate.likelihood import Fork, Likelihood, LikelihoodScorer
from llmctl.evaluate.prompts import Item
from llmctl.evaluate.settings import EvalSettings
from llmctl.evaluate.shared_prefix import Prefixed, SharedPrefix
from llmctl.evaluate.task import Task
from llmctl.generation.complete import prepare
from llmctl.generation.completion import Completion
from llmctl.generation.decode import decode
from llmctl.generation.session import Session
from llmctl.generation.settings import Sampling, resolve
from llmctl.ops.linear import MatmulPrecision

_BATCHES_PER_WINDOW = 16  # items are sorted within so many batches
Record = dict[str, Any]


class LanguageModelJudge:
    """`rate`, where given, turns a prompt and the text generated for it into a number: a reward model."""

    def __init__(
        self,
        session: Session,
        batch_size: int = 32,
        on_long: str = "skip",
        max_new_tokens: int | None = None,
        rate: Callable[[str, str], float] | None = None,
        matmul_precision: MatmulPrecision = "highest",
    ):
        model = session.model
        self.session, self.batch_size, self._on_long, self._rate = session, batch_size, on_long, rate
        self._max_new_tokens = max_new_tokens
        self.encoder = PairEncoder(session.tokenizer, model.config.encoder is not None)
        self.scorer = LikelihoodScorer(model, session.marks.start, batch_size, matmul_precision)
        self._prefix = SharedPrefix(model)
        stack = model if model.config.encoder is None else getattr(model, "encoder", model)
        positions = stack.config.max_positions
        self.room: int | None = None if positions is None else positions - getattr(stack, "n_virtual", 0)
        """Tokens of a prompt; None where there is no end."""

    @classmethod
    def of(cls, session: Session, settings: EvalSettings, rate=None) -> LanguageModelJudge:
        return cls(
            session, settings.batch_size, settings.on_long, settings.max_new_tokens, rate, settings.matmul_precision
        )

    def run(self, task: Task, items: Iterable[Item]) -> Iterator[Record]:
        """The record of each item as it is done: nearly in their order, since like lengths run together."""
        if task.kind == "classification" and task.choices is None:
            raise UserError(
                f"task {task.name} has no 'choices', of which a language model takes the likeliest",
                hint="only a classifier has labels of its own",
            )
        items = iter(items)
        work = self._write if task.kind in ("generation", "reward") else self._score
        while window := list(itertools.islice(items, self.batch_size * _BATCHES_PER_WINDOW)):
            yield from work(task, window)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """The number of each prompt with its completion, as soon as it is there: in any order."""
        model = self.session.model
        for batch in plan(prompts, self.batch_size, self._prefix.is_possible):
            how = {"marks": self.session.marks, "tokenizer": self.session.tokenizer}
            running = {number: prepare(model, prompts[number], sampling, **how) for number in batch.numbers}
            for _ in decode(Prefixed(model, self._prefix, batch.shared), list(running.values())):
                for number in [number for number, each in running.items() if each.finish_reason is not None]:
                    yield number, running.pop(number)

    def _score(self, task: Task, items: list[Item]) -> Iterator[Record]:
        forks: list[Fork] = []
        owners: list[tuple[int, int]] = []
        said: list[Record] = []
        for place, item in enumerate(items):
            own, note = self._fitting(item, self._forks(task, item))
            owners += [(place, number) for number in range(len(own))]
            forks += own
            said.append({"task": task.name, "id": item.number, **_group(item), **note})
            if not own:
                yield said[place]
        counts = collections.Counter(place for place, _ in owners)
        missing = [[None] * counts[place] for place in range(len(items))]
        for number, likelihoods in self.scorer.score(forks, asks_greedy=task.kind == "cloze"):
            place, part = owners[number]
            missing[place][part] = likelihoods
            if None not in missing[place]:
                found: list[Likelihood] = list(itertools.chain(*missing[place]))
                yield {**said[place], **judged(task, items[place], found)}

    def _forks(self, task: Task, item: Item) -> list[Fork]:
        if "_forks" in item.fields:
            return item.fields["_forks"]
        if task.kind == "regression":
            ids = self.encoder.behind_prefix(item.contexts[0])
            return [Fork(ids[:1], [ids[1:]])]
        by_context = itertools.groupby(zip(item.contexts, item.continuations), key=lambda pair: pair[0])
        return [
            fork
            for context, pairs in by_context
            for fork in self.encoder.fork(context, [continuation for _, continuation in pairs], item.place)
        ]

    def _fitting(self, item: Item, forks: list[Fork]) -> tuple[list[Fork], Record]:
        """The forks as far as they fit into the context, and a note of what did not."""
        has_source = self.session.model.config.encoder is not None
        lengths = [len(fork.context) + (0 if has_source else max(map(len, fork.continuations)) - 1) for fork in forks]
        if self.room is None or max(lengths, default=0) <= self.room:
            return forks, {}
        excess = max(lengths) - self.room
        if self._refuses(item.place, max(lengths)):
            return [], {"overflow": max(lengths)}
        shorter = []
        for fork in forks:
            for ids in fork.continuations:
                kept = self.room - (0 if has_source else len(ids) - 1)
                if kept < 1:
                    return [], {"overflow": max(lengths)}
                shorter.append(Fork(fork.context[-kept:], [ids]))
        return shorter, {"truncated": excess}

    def _refuses(self, place: str, length: int) -> bool:
        if self._on_long == "error":
            raise UserError(
                f"{place}: the prompt has {length} tokens, the model's context is {self.room}",
                hint="lower --num-fewshot, or choose --on-long skip or truncate",
            )
        return self._on_long == "skip"

    def _write(self, task: Task, items: list[Item]) -> Iterator[Record]:
        sampling = greedy(self._max_new_tokens or task.max_new_tokens, task.stop)
        prompts, asked, notes = [], [], []
        for item in items:
            ids, note = self.fitting_prompt(item.contexts[0], item.place, sampling.max_new_tokens)
            record = {"task": task.name, "id": item.number, **_group(item), **note}
            if ids is None:
                yield record
            else:
                prompts.append(ids)
                asked.append(item)
                notes.append(record)
        for number, completion in self.generate(prompts, sampling):
            if completion.is_cut_by_context:
                notes[number]["cut_by_context"] = len(completion.ids)
            said = self._rated(asked[number], completion) if task.kind == "reward" else None
            yield {**notes[number], **(said or judged_text(task, asked[number], completion.text))}

    def _rated(self, item: Item, completion: Completion) -> Record:
        if self._rate is None:
            raise UserError("a reward task needs a reward model", hint="give one as --reward MODEL, or as MODEL itself")
        text = completion.text
        return {"completion": text, "scores": {"reward": self._rate(item.contexts[0], text)}}

    def fitting_prompt(self, text: str, place: str, max_new_tokens: int) -> tuple[Sequence[int] | None, Record]:
        """Ids of a prompt, None where it does not fit, and a note of what was done. Raises UserError naming the place."""
        ids = self.encoder.prompt(text)
        if self.room is None or len(ids) <= self.room:
            has_source = self.session.model.config.encoder is not None
            if self._on_long != "truncate" or self.room is None or has_source:
                return ids, {}
        kept = self.room - max_new_tokens
        if kept >= len(ids):
            return ids, {}
        if self._refuses(place, len(ids)) or kept < 1:
            return None, {"overflow": len(ids)}
        return ids[-kept:], {"truncated": len(ids) - kept}


def greedy(max_new_tokens: int, stop: Sequence[str] = ()) -> Sampling:
    """The likeliest token every time, whatever the checkpoint recommends."""
    return resolve(Sampling(max_new_tokens=max_new_tokens, stop=tuple(stop), temperature=0.0))


def _group(item: Item) -> Record:
    return {} if item.group is None else {"group": item.group}
