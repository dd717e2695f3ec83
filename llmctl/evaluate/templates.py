"""Jinja templates of task files: text for prompts, values for choices and answers, and errors that name the column."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmctl.errors import UserError

_ONE_EXPRESSION = re.compile(r"\s*\{\{((?:(?!\{\{|\}\}|\{%).)*)\}\}\s*", re.DOTALL)
_UNDEFINED = re.compile(r"'(\w+)' is undefined")


def text(template: str, row: Mapping[str, Any], place: str) -> str:
    """The template filled from a row. Raises UserError naming the column that the row has not got, and those it has."""
    return _filled(lambda: _compiled(template).render(**row), template, row, place)


def value(template: Any, row: Mapping[str, Any], place: str) -> Any:
    """What one `{{ expression }}` gives, of its own type; any other text filled; a list with each of its parts so."""
    if isinstance(template, list):
        return [text(each, row, place) if isinstance(each, str) else each for each in template]
    if not isinstance(template, str):
        return template
    found = _ONE_EXPRESSION.fullmatch(template)
    if found is None:
        return text(template, row, place)
    return _filled(lambda: _known(_expression(found[1])(**row)), template, row, place)


def _filled(fill, template: str, row: Mapping[str, Any], place: str) -> Any:
    try:
        return fill()
    except jinja2.UndefinedError as error:
        missing = _UNDEFINED.search(str(error))
        what = f"there is no column {missing[1]!r}" if missing else f"{template.strip()!r}: {error}"
        columns = [name for name in row if not name.startswith("_")]
        raise UserError(f"{place}: {what}", hint=f"its columns are {', '.join(columns) or 'none'}") from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{template.strip()!r}: not a template: {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{place}: {template.strip()!r} cannot be filled: {error}") from error


def _known(found: Any) -> Any:
    """Nothing that is undefined leaves here."""
    if isinstance(found, jinja2.Undefined):
        str(found)
    return found


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, by="": re.sub(pattern, by, text)
    environment.filters["position"] = lambda text, part: text.index(part)
    return environment


@functools.lru_cache(maxsize=256)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=256)
def _expression(source: str):
    return _environment().compile_expression(source, undefined_to_none=False)
