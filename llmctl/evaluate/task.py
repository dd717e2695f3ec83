"""What a task file says: how a row becomes a prompt, what is asked of the model, and how its answer is judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmctl.errors import CalledWrongly, UserError, did_you_mean
from llmctl.evaluate.rows import Form

FOLDER = Path(__file__).parent / "tasks"
KINDS = {
    # what a file of each kind must say
    "multiple_choice": ("prompt", "choices", "answer"),
    "cloze": ("prompt", "answer"),
    "generation": ("prompt",),
    "classification": ("prompt", "answer"),
    "regression": ("prompt", "answer"),
    "preference": ("prompt", "chosen", "rejected"),
    "reward": ("prompt",),
    "perplexity": ("prompt",),
}
METRICS = {
    "multiple_choice": ("acc", "acc_norm", "mc2"),
    "cloze": ("acc", "perplexity"),
    "generation": ("exact_match", "squad_exact", "f1", "pass@1"),
    "classification": ("acc", "macro_f1"),
    "regression": ("spearman", "rmse"),
    "preference": ("acc", "acc_norm", "margin"),
    "reward": ("reward",),
    "perplexity": ("nats_per_token", "perplexity", "bits_per_byte"),
}
_TYPES = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "dict[str, Extraction]": (dict, "keys and values"),
}


@dataclass(frozen=True)
class Extraction:
    """An answer taken out of a text: match number `group` of a regular expression (-1 the last), or `default`."""

    regex: str
    group: int = 0
    default: str = "[invalid]"


@dataclass(frozen=True)
class FewShot:
    """Which rows come as examples: drawn by `sampler` random or first, from `data` or else the task's own other rows.

    With `match` only rows that have the same value in that column do.
    """

    sampler: str = "random"
    data: str | None = None
    match: str | None = None
    delimiter: str = "\n\n"


@dataclass(frozen=True)
class Task:
    """A task file. Texts are Jinja templates over the columns of a row; README describes each key."""

    name: str
    kind: str
    prompt: str
    about: str = ""
    data: str | None = None
    description: str = ""
    choices: Any = None
    answer: Any = None
    continuation: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    delimiter: str = " "
    num_fewshot: int = 0
    fewshot: FewShot = field(default_factory=FewShot)
    metrics: tuple[str, ...] = ()
    group: str | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    extract: dict[str, Extraction] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    ignore_case: bool = False
    ignore_punctuation: bool = False
    code: str | None = None
    seconds: float = 10.0
    form: Form = field(default_factory=Form)

    @property
    def sha256(self) -> str:
        """The identity of what is asked, wherever the data lie."""
        content = {**dataclasses.asdict(self), "data": None, "about": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shipped() -> list[Task]:
    """The tasks that come with llmctl, by name."""
    return [load(path) for path in sorted(FOLDER.glob("*.yaml"))]


def find(word: str) -> Task:
    """A task by NAME or by the path of its file, with =DATA behind it where its data lie elsewhere."""
    name, _, data = (word, "", "") if Path(word).exists() else word.partition("=")
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = [each.stem for each in FOLDER.glob("*.yaml")]
        hint = did_you_mean(name, known) or "llmctl eval --list shows those there are"
        raise CalledWrongly(f"--task {name}: no such task", hint=hint)
    task = load(path)
    return dataclasses.replace(task, data=data) if data else task


def load(path: str | Path) -> Task:
    """Read a task file. Raises UserError naming the key that is wrong, missing or unknown."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a task file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a task file: expected keys and values")
    _refuse_unknown(Task, content, str(path))
    content = {"name": Path(path).stem, **content}
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{path}: kind is {kind!r}; expected {', '.join(KINDS)}")
    if content.get("prompt") is None:
        raise UserError(f"{path}: a task of kind {kind} needs 'prompt'")
    extract = _typed(content.get("extract", {}), "dict[str, Extraction]", f"{path}: extract")
    content["extract"] = {name: _part(Extraction, each, f"{path}: extract {name}") for name, each in extract.items()}
    content["fewshot"] = _part(FewShot, content.get("fewshot", {}), f"{path}: fewshot")
    content["form"] = _part(Form, content.get("form", {}), f"{path}: form")
    task = _part(Task, content, str(path))
    _check(task, path)
    beside = lambda data: None if data is None else str(Path(path).parent / data)  # noqa: E731
    fewshot = dataclasses.replace(task.fewshot, data=beside(task.fewshot.data))
    return dataclasses.replace(task, data=beside(task.data), fewshot=fewshot)


def _check(task: Task, path: str | Path) -> None:
    """Raise UserError for what would be found out in the middle of a run, or never."""
    if missing := next((key for key in KINDS[task.kind] if getattr(task, key) is None), None):
        raise UserError(f"{path}: a task of kind {task.kind} needs {missing!r}")
    if unknown := next((metric for metric in task.metrics if metric not in METRICS[task.kind]), None):
        known = ", ".join(METRICS[task.kind])
        raise UserError(f"{path}: no metric {unknown!r} of a task of kind {task.kind}", hint=f"there are {known}")
    if "pass@1" in task.metrics and task.code is None:
        raise UserError(f"{path}: the metric pass@1 needs 'code', the program that is to be run")
    if task.fewshot.sampler not in ("random", "first"):
        raise UserError(f"{path}: sampler is {task.fewshot.sampler!r}; expected random or first")
    if task.num_fewshot < 0 or task.max_new_tokens < 1 or task.seconds <= 0:
        raise UserError(f"{path}: num_fewshot is at least 0, max_new_tokens at least 1, seconds more than 0")
    for pattern in (*task.ignore, *(each.regex for each in task.extract.values())):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: {pattern!r} is no regular expression: {error}") from error


def _part(cls, content: Any, name: str):
    """A dataclass of a mapping."""
    fields = {each.name: each for each in dataclasses.fields(cls)}
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected keys and values, got {content!r}")
    _refuse_unknown(cls, content, name)
    missing = [key for key, each in fields.items() if key not in content and _is_needed(each)]
    if missing:
        raise UserError(f"{name}: there is no {missing[0]!r}")
    return cls(**{key: _typed(value, str(fields[key].type), f"{name}: {key}") for key, value in content.items()})


def _refuse_unknown(cls, content: dict, name: str) -> None:
    known = [each.name for each in dataclasses.fields(cls)]
    if unknown := next((key for key in content if key not in known), None):
        raise UserError(f"{name}: unknown key {unknown!r}", hint=did_you_mean(str(unknown), known))


def _is_needed(each: dataclasses.Field) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _typed(value: Any, kind: str, name: str) -> Any:
    """A value of the type that its field is annotated with; one text stands for a list of one."""
    if kind.startswith("tuple"):
        texts = (value,) if isinstance(value, str) else value
        if isinstance(texts, (list, tuple)) and all(isinstance(each, str) for each in texts):
            return tuple(texts)
        raise UserError(f"{name} is {value!r}; expected a list of texts")
    if value is None and kind.endswith("| None"):
        return value
    expected, words = _TYPES.get(kind.removesuffix(" | None"), (object, ""))
    is_number = expected is not object and expected is not bool and isinstance(value, bool)
    if is_number or not isinstance(value, expected):
        raise UserError(f"{name} is {value!r}; expected {words}")
    return value
