"""Recipes: YAML whose keys are the long flags of the commands."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

from llmctl.errors import CalledWrongly


def load_mapping(path: str | Path) -> dict[str, object]:
    """Read a YAML mapping; scalars stay strings (1e-5 and `on` as written), null is None, duplicate keys are refused."""
    value = _load(path)
    if not isinstance(value, dict):
        raise CalledWrongly(
            f"{path}: expected keys and values, got {_kind(value)}", hint="write one flag a line: `lr: 3e-4`"
        )
    return value


def checked_keys(values: dict[str, object], known: Collection[str], where: str | Path) -> dict[str, object]:
    """The values that are set, under kebab-case keys; a key that is not in `known` is refused."""
    checked = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known keys: {', '.join(sorted(known))}"
            raise CalledWrongly(f"{where}: unknown key '{key}'", hint=hint)
        if name in checked:
            raise CalledWrongly(f"{where}: '{key}' is given twice")
        if isinstance(value, dict):
            raise CalledWrongly(f"{where}: '{key}' expects a value, got keys and values")
        if value is not None:
            checked[name] = value
    return checked


def _load(path: str | Path) -> object:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise CalledWrongly(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


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
    return "nothing" if value is None else "a list" if isinstance(value, list) else f"'{value}'"
