"""One run of `llmctl eval`: a model, tasks one after another, and a file that each item is added to."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmctl import lineage
from llmctl.classify import TextClassifier
from llmctl.errors import CalledWrongly, UserError
from llmctl.evaluate import perplexity, rows
from llmctl.evaluate.classifier_judge import ClassifierJudge
from llmctl.evaluate.judge import LanguageModelJudge
from llmctl.evaluate.prompts import Item, Prompter, Style
from llmctl.evaluate.results import Record, ResultsFile
from llmctl.evaluate.settings import EvalSettings
from llmctl.evaluate.summary import Number, summarize
from llmctl.evaluate.task import Task
from llmctl.finetune.assembly import Assembly
from llmctl.generation.session import Session, load

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Done:
    """What a task came to: its numbers, the records of its items, and what a person should know of them."""

    task: Task
    run: Record
    records: list[Record]
    numbers: list[Number]
    notes: list[str]


class Evaluation:
    """A model that is ready to be asked."""

    def __init__(self, path: str | os.PathLike, settings: EvalSettings):
        self.path, self.settings = Path(path), settings
        self._assembly = Assembly.find(path, settings.adapter, settings.force)
        self.session: Session | None = None
        model = load(self._assembly, settings)
        self.tokenizer = self._assembly.tokenizer()
        parts = model.parameters() if isinstance(model, torch.nn.Module) else ()
        self.n_parameters = sum(each.numel() for each in parts) or None
        if model.config.classifier is not None:
            how = {"batch_size": settings.batch_size, "literal": not settings.apply_chat_template, "name": str(path)}
            how["on_long"] = "truncate" if settings.on_long == "truncate" else "error"
            self.judge = ClassifierJudge(TextClassifier(model, self.tokenizer, **how))
        else:
            self.session = Session.of(model, self.tokenizer, self._assembly.generation_config_directory)
            self.judge = LanguageModelJudge.of(self.session, settings, self._rater())

    def run(self, task: Task, results: ResultsFile, show: Callable[[str], None], progress: Progress) -> Done:
        """Run a task to its end, from where `results` left it. `show` gets the prompts that are to be shown."""
        items, identity = self._items(task)
        run = self.about(task, identity)
        limit = self.settings.limit
        records = [each for each in results.begin(run) if limit is None or each["id"] < limit]
        done = {record["id"] for record in records}
        items = itertools.islice(items, limit)
        shown = _shown(items, self.settings.show, show)
        for record in self.judge.run(task, (item for item in shown if item.number not in done)):
            results.append(record)
            records.append(record)
            progress(len(records), task.name)
        if not records and limit != 0:
            name = "standard input" if task.data == "-" else (task.data or task.name).replace("\n", ", ")
            raise UserError(f"{name}: no text in it, so there is nothing to measure")
        records.sort(key=lambda record: record["id"])
        numbers = summarize(task.name, task.kind, task.metrics, records)
        return Done(task, run, records, numbers, notes(records))

    def about(self, task: Task, data_sha256: str) -> Record:
        """What a results file says in front of a task's items: all that its numbers depend on, and names."""
        settings = self.settings
        return {
            "task": task.name,
            "task_kind": task.kind,
            "metrics": list(task.metrics),
            "model": str(self.path),
            "parameters": self.n_parameters,
            "model_sha256": self.model_sha256(),
            "task_sha256": task.sha256,
            "data_sha256": data_sha256,
            "num_fewshot": task.num_fewshot if settings.num_fewshot is None else settings.num_fewshot,
            "seed": settings.seed,
            "chat": settings.apply_chat_template,
            "multiturn": settings.fewshot_as_multiturn,
            "system": settings.system,
            "on_long": settings.on_long,
            "max_new_tokens": settings.max_new_tokens or task.max_new_tokens,
            "dtype": settings.dtype,
            "kv_dtype": settings.kv_dtype,
            "matmul_precision": settings.matmul_precision,
            "limit": settings.limit,
            **({"window": settings.window, "stride": settings.stride} if task.kind == "perplexity" else {}),
        }

    def model_sha256(self) -> str:
        """Over the weights of the base and of its adapters."""
        parts = [_weights_sha256(self._assembly.base)]
        parts += [f"{_weights_sha256(path)} {weight}" for path, weight in self._assembly.adapters]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _items(self, task: Task) -> tuple[Iterator[Item], str]:
        if task is perplexity.TASK or task.kind == "perplexity":
            return self._texts(task)
        if task.data is None:
            raise CalledWrongly(
                f"--task {task.name}: where is its data?",
                hint=f"--task {task.name}=FILE; --list says which file it reads",
            )
        found = rows.read(task.data, task.form)
        settings = self.settings
        chat = settings.apply_chat_template
        style = Style(settings.num_fewshot, settings.seed, chat, settings.fewshot_as_multiturn, settings.system)
        examples = settings.fewshot_data or task.fewshot.data
        pool = rows.read(examples, task.form) if examples else None
        prompter = Prompter(task, style, self.tokenizer, pool)
        content = json.dumps([[row.fields for row in part or []] for part in (found, pool)], default=str)
        return prompter.items(found), hashlib.sha256(content.encode()).hexdigest()

    def _texts(self, task: Task) -> tuple[Iterator[Item], str]:
        if self.session is None:
            raise UserError("this model is a classifier: it predicts no tokens, so it has no perplexity")
        paths = (task.data or "").split("\n") if task.data else []
        if not paths:
            raise CalledWrongly("perplexity of which texts?", hint="llmctl eval MODEL FILES…, or - for standard input")
        size = perplexity.sizes(self.judge.room, self.settings.window, self.settings.stride)
        # A pipe and a directory of shards go by their names.
        parts = [lineage.file_sha256(path) if os.path.isfile(path) else path for path in paths]
        identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return perplexity.items(perplexity.documents(paths, self.judge.encoder), *size, self.tokenizer), identity

    def _rater(self) -> Callable[[str, str], float] | None:
        if self.settings.reward is None:
            return None
        literal = not self.settings.apply_chat_template
        model = TextClassifier.open(
            self.settings.reward, self.settings.asked_dtype, self.settings.device, literal=literal
        )
        return ClassifierJudge(model).reward


def _weights_sha256(path: Path) -> str:
    """Of a checkpoint or one file, and of an exported graph with what lies beside it."""
    graphs = [f"{each.name} {lineage.file_sha256(each)}" for each in sorted(path.glob("*.onnx*")) if each.is_file()]
    return " ".join([lineage.weights_sha256(path), *graphs])


def _shown(items: Iterator[Item], count: int, show: Callable[[str], None]) -> Iterator[Item]:
    for number, item in enumerate(items):
        if number < count:
            asked = itertools.zip_longest(item.contexts, item.continuations)
            for context, pairs in itertools.groupby(asked, key=lambda pair: pair[0]):
                show(f"--- {item.place}: {context}")
                for _, continuation in pairs:
                    if continuation is not None:
                        show(f"⟶{continuation}")
        yield item


def notes(records: Sequence[Record]) -> list[str]:
    """What was left out, shortened or cut, counted."""
    words = {
        "overflow": "items did not fit into the context and are not in the numbers",
        "truncated": "prompts lost their beginning to fit into the context",
        "cut_by_context": "answers were cut short by the context",
    }
    counts: dict[str, Any] = {key: sum(key in record for record in records) for key in words}
    return [f"{counts[key]} of {len(records)} {text}" for key, text in words.items() if counts[key]]
