"""What a task file says: how a row becomes a prompt, what is asked of the model, and how its answer is judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
    content = {"name": Path(path).stem, **content}
    _check_keys(content, path)
    if content.get("data"):
        content["data"] = str(Path(path).parent / content["data"])
    fewshot = _part(FewShot, content.get("fewshot", {}), f"{path}: fewshot")
    if fewshot.data:
        fewshot = dataclasses.replace(fewshot, data=str(Path(path).parent / fewshot.data))
    content["fewshot"], content["form"] = fewshot, _part(Form, content.get("form", {}), f"{path}: form")
    extract = content.get("extract", {})
    content["extract"] = {name: _part(Extraction, each, f"{path}: extract {name}") for name, each in extract.items()}
    task = _part(Task, content, str(path))
    if missing := next((key for key in KINDS[task.kind] if getattr(task, key) is None), None):
        raise UserError(f"{path}: a task of kind {task.kind} needs {missing!r}")
    return task


def _check_keys(content: dict[str, Any], path: str | Path) -> None:
    if content.get("kind") not in KINDS:
        raise UserError(f"{path}: kind is {content.get('kind')!r}; expected {', '.join(KINDS)}")
    if "prompt" not in content:
        raise UserError(f"{path}: a task of kind {content['kind']} needs 'prompt'")
    if content.get("fewshot", {}).get("sampler", "random") not in ("random", "first"):
        raise UserError(f"{path}: sampler is {content['fewshot']['sampler']!r}; expected random or first")


def _part(cls, content: Any, name: str):
    """A dataclass of a mapping; lists become tuples where the field is one."""
    fields = {each.name: each for each in dataclasses.fields(cls)}
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected keys and values, got {content!r}")
    if unknown := next((key for key in content if key not in fields), None):
        raise UserError(f"{name}: unknown key {unknown!r}", hint=did_you_mean(str(unknown), fields))
    tuples = {key for key, each in fields.items() if str(each.type).startswith("tuple")}
    return cls(**{key: tuple(value) if key in tuples else value for key, value in content.items()})
