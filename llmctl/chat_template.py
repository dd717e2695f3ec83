"""Chats to the text that a model was trained on: Jinja templates in a sandbox, rendered as transformers renders them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmctl.errors import UserError

# Around what `{% generation %}` holds, until its place is noted: noncharacters, which no text that is passed on may hold.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Rendered:
    """A chat's text, and the characters [start, stop) of it that the template marks as the model's own words."""

    text: str
    generated: list[tuple[int, int]]


def render(
    template: str,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping] | None = None,
    documents: Sequence[Mapping] | None = None,
    **variables: object,
) -> Rendered:
    """The text of `messages`; `variables` are what else the template may ask for, `bos_token` and its like among them.

    Raises UserError where the template is broken, or refuses the messages.
    """
    if not messages:
        raise UserError("a chat without messages has no text")
    messages = [_message(message) for message in messages]
    if any(mark in json.dumps(messages, ensure_ascii=False, default=str) for mark in (_OPEN, _CLOSE)):
        raise UserError("a message holds the noncharacter U+FDD0 or U+FDD1")
    try:
        text = _compiled(template).render(
            messages=messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except _FAILURES as error:
        raise _refusal(error) from error
    return _without_marks(text)


def by_name(templates: str | Sequence[Mapping] | None) -> dict[str, str]:
    """A tokenizer's templates as tokenizer_config.json holds them, one of them called default or several with names."""
    if isinstance(templates, str):
        return {"default": templates}
    return {each["name"]: each["template"] for each in templates or ()}


def choose(templates: str | Sequence[Mapping] | None, name: str | None = None, tools: bool = False) -> str:
    """One of a tokenizer's templates: `name`, else tool_use where there are tools, else default.

    Raises UserError where the tokenizer has no such template.
    """
    named = by_name(templates)
    if not named:
        raise UserError("the tokenizer has no chat template", hint="is this a model for chats?")
    wanted = [name] if name else (["tool_use"] if tools else []) + ["default"]
    found = next((named[each] for each in wanted if each in named), None)
    if found is None:
        raise UserError(f"no chat template {wanted[-1]!r}; the tokenizer has {', '.join(map(repr, named))}")
    return found


def _message(message: Mapping) -> dict:
    """Without empty fields; what the model thought is found under each of the names that templates give it."""
    plain = {key: value for key, value in message.items() if value is not None}
    thought = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` around the model's own words."""

    tags = frozenset(["generation"])

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _without_marks(text: str) -> Rendered:
    first, *parts = text.split(_OPEN)
    generated = []
    length = len(first)
    plain = [first]
    for part in parts:
        inside, _, behind = part.partition(_CLOSE)
        generated.append((length, length + len(inside)))
        plain += [inside, behind]
        length += len(inside) + len(behind)
    return Rendered("".join(plain), generated)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter makes it safe for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Refused(jinja2.TemplateError):
    """What a template says of messages that it does not take."""


def _refusal(error: Exception) -> UserError:
    if isinstance(error, _Refused):
        return UserError(f"the chat template does not take these messages: {error.message}")
    if isinstance(error, jinja2.TemplateSyntaxError):
        return UserError(f"the chat template is broken: line {error.lineno}: {error.message}")
    return UserError(f"the chat template failed: {error}")
