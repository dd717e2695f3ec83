"""Recipes: YAML whose keys are the long flags of the commands."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmctl.errors import CalledWrongly, did_you_mean

_STEP_FORM = "a step is `- pretrain: {time: 10m, output: runs/base}`"


@dataclass
class Step:
    """One entry of a recipe's `steps`: a command and its flags as written, values not yet typed."""

    name: str
    command: str
    flags: dict[str, object]
    overridden: set[str] = field(default_factory=set)


def load_mapping(path: str | Path) -> dict[str, object]:
    """Read a YAML mapping; scalars stay strings (1e-5 and `on` as written), null is None, duplicate keys are refused."""
    value = _load(path)
    if not isinstance(value, dict):
        raise CalledWrongly(f"{path}: expected keys, got {_kind(value)}", hint="write one flag a line: `lr: 3e-4`")
    return value


def load_steps(path: str | Path, overrides: Sequence[str] = ()) -> list[Step]:
    """Read a recipe of steps, apply `step.flag=value` overrides to it, and replace its ${variables}."""
    recipe = checked_keys(load_mapping(path), ("vars", "steps"), path, nested=True)
    entries = recipe.get("steps")
    if not isinstance(entries, list) or not entries:
        raise CalledWrongly(f"{path}: expected a list of steps, got {_kind(entries)}", hint=_STEP_FORM)
    variables = recipe.get("vars", {})
    if not isinstance(variables, dict):
        raise CalledWrongly(f"{path}: 'vars' expects keys and values, got {_kind(variables)}")
    steps = [_step(entry, f"{path}: step {i}") for i, entry in enumerate(entries, start=1)]
    for override in overrides:
        _override(steps, variables, override)
    known = _resolve_variables(variables, path)
    for step in steps:
        step.flags = {flag: _substitute(value, known, path) for flag, value in step.flags.items()}
    return steps


def checked_keys(
    values: dict[str, object], known: Collection[str], where: str | Path, nested: bool = False
) -> dict[str, object]:
    """The values that are set, under kebab-case keys; a key not in `known` and (unless `nested`) a mapping are refused."""
    checked = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in known:
            hint = did_you_mean(name, known) or f"known keys: {', '.join(sorted(known))}"
            if name == "steps":
                hint = f"a recipe of steps is run by: llmctl run {where}"
            raise CalledWrongly(f"{where}: unknown key '{key}'", hint=hint)
        if name in checked:
            raise CalledWrongly(f"{where}: '{key}' is given twice")
        if isinstance(value, dict) and not nested:
            raise CalledWrongly(f"{where}: '{key}' expects a value, got keys and values")
        if value is not None:
            checked[name] = value
    return checked


def _step(entry: object, where: str) -> Step:
    if not isinstance(entry, dict):
        raise CalledWrongly(f"{where}: expected a command and its flags, got {_kind(entry)}", hint=_STEP_FORM)
    commands = {key: value for key, value in entry.items() if key != "name"}
    if len(commands) != 1:
        raise CalledWrongly(f"{where}: expected one command, got {', '.join(commands) or 'none'}", hint=_STEP_FORM)
    ((command, flags),) = commands.items()
    if not isinstance(flags, (dict, type(None))):
        raise CalledWrongly(f"{where}: expected the flags of '{command}', got {_kind(flags)}", hint=_STEP_FORM)
    return Step(entry.get("name") or command, command.replace("_", "-"), flags or {})


def _override(steps: list[Step], variables: dict[str, object], override: str) -> None:
    target, equals, text = override.partition("=")
    wanted, dot, flag = target.rpartition(".")
    if not equals or not dot:
        raise CalledWrongly(f"--set {override}: expected step.flag=value, as in --set pretrain.time=10m")
    value = _parse(text) if text.startswith("[") else None if text == "null" else text
    if wanted == "vars":
        variables[flag] = value
        return
    found = [step for i, step in enumerate(steps, start=1) if wanted in (step.name, step.command, str(i))]
    if len(found) != 1:
        names = ", ".join(f"{i} ({step.name})" for i, step in enumerate(steps, start=1))
        problem = "no such step" if not found else "several steps have that name"
        raise CalledWrongly(f"--set {override}: {problem}", hint=f"the steps are {names}")
    kept = {key: old for key, old in found[0].flags.items() if key.replace("_", "-") != flag.replace("_", "-")}
    found[0].flags = {**kept, flag: value}
    found[0].overridden.add(flag.replace("_", "-"))


def _resolve_variables(variables: dict[str, object], path: str | Path) -> dict[str, str]:
    known: dict[str, str] = {}
    for name, value in variables.items():
        if not isinstance(value, str):
            raise CalledWrongly(f"{path}: vars: '{name}' expects one value, got {_kind(value)}")
        known[name] = _substitute(value, known, path)
    return known


def _substitute(value, known: dict[str, str], path: str | Path):
    if isinstance(value, list):
        return [_substitute(item, known, path) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{([^}]*)\}", lambda match: _variable(match[1], known, path), value)


def _variable(name: str, known: dict[str, str], path: str | Path) -> str:
    """A variable of the recipe, a directory of this Python (`python:stdlib`), or the environment's, in this order."""
    if name in known:
        return known[name]
    scheme, colon, part = name.partition(":")
    if colon and scheme == "python" and part in sysconfig.get_path_names():
        return sysconfig.get_path(part)
    if name in os.environ:
        return os.environ[name]
    hint = "define it under `vars:` or in the environment"
    if scheme == "python" and colon:
        hint = f"of Python there are {', '.join(sysconfig.get_path_names())}"
    raise CalledWrongly(f"{path}: no variable ${{{name}}}", hint=hint)


def _load(path: str | Path) -> object:
    try:
        return _parse(Path(path).read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise CalledWrongly(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _parse(text: str, where: str | Path = "--set") -> object:
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise CalledWrongly(f"{where}{line}: {getattr(error, 'problem', None) or error}") from error


def _loader():
    """A YAML loader that types nothing but null: click types the values, and knows what each flag wants."""
    import yaml

    class Loader(yaml.BaseLoader):
        pass

    def mapping(loader, node):
        seen = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                message = f"duplicate key '{key}'"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen[key] = loader.construct_object(value_node, deep=True)
        return seen

    def scalar(loader, node):
        is_null = node.style is None and node.value in ("", "~", "null")
        return None if is_null else loader.construct_scalar(node)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_constructor("tag:yaml.org,2002:str", scalar)
    return Loader


def _kind(value: object) -> str:
    """What a value is, for a message."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "keys and values"
    return "nothing" if value is None else f"'{value}'"
