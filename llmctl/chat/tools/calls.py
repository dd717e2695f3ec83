"""Calls of tools in the forms that model families write them, found in what a model itself has said and nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from llmctl.chat.tools.toolbox import Call

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")


class Said(NamedTuple):
    """An answer's text around its calls, and the calls."""

    text: str
    calls: list[Call]


class Format(NamedTuple):
    """`is_known`: the template itself tells the model of its tools. `parse` reads an answer with special tokens in it."""

    name: str
    is_known: bool
    parse: Callable[[str], Said]


def format_of(template: str, markup: str = "") -> Format:
    """The form that a chat template asks for; `markup` are the tokenizer's added tokens, in one text.

    One that knows no tools gets the form of Hermes, described in the system message.
    """
    is_known = "tools" in template
    if is_known and "[TOOL_CALLS]" in template + markup:
        return Format("mistral", True, parse_mistral)
    if is_known and "<tool_call>" in template:
        return Format("hermes", True, parse_hermes)
    if is_known and ("ipython" in template or "<|python_tag|>" in template):
        return Format("llama3", True, parse_llama3)
    return Format("hermes", False, parse_text)


def parse_hermes(raw: str) -> Said:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number (Hermes, Qwen)."""
    calls = [_from_json(found[1]) for found in _HERMES.finditer(raw)]
    return Said(_HERMES.sub("", raw).strip(), calls)


def parse_text(raw: str) -> Said:
    """For a template that knows no tools: as Hermes, or bare JSON, which the plain transcript is trained with."""
    said = parse_hermes(raw)
    return said if said.calls else parse_llama3(raw)


def parse_llama3(raw: str) -> Said:
    """A whole answer that is JSON with `name` and `parameters`, several behind semicolons (Llama 3.1 to 3.3)."""
    body = raw.replace("<|python_tag|>", "", 1).strip()
    is_marked = raw.lstrip().startswith("<|python_tag|>")
    values, rest = _json_values(body, separators=";, \n")
    is_call = bool(values) and not rest and all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in values)
    if is_call:
        return Said("", [_from_value(value) for value in values])
    if is_marked:
        return Said("", [Call("", {}, f"the call is no JSON with name and parameters: {body[:200]!r}")])
    return Said(raw.strip(), [])


def parse_mistral(raw: str) -> Said:
    """`[TOOL_CALLS]` and a list of objects, or a name with its arguments behind it (Mistral)."""
    text, *parts = raw.split("[TOOL_CALLS]")
    calls = []
    for part in parts:
        named = _MISTRAL_NAMED.match(part)
        values, _ = _json_values(part[named.end() :] if named else part)
        if not values:
            calls.append(Call("", {}, f"the call is no JSON: {part.strip()[:200]!r}"))
        elif named:
            calls.append(_from_value({"name": named[1], "arguments": values[0]}))
        else:
            listed = values[0] if isinstance(values[0], list) else values[:1]
            calls += [_from_value(value) for value in listed]
    return Said(text.strip(), calls)


def described(schemas: list[dict]) -> str:
    """What a system message says of tools where the template says nothing."""
    lines = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    return (
        f"You may call these functions:\n{lines}\n"
        'To call one, answer with nothing but <tool_call>{"name": ..., "arguments": {...}}</tool_call>; '
        "the result will follow."
    )


def as_message(text: str, calls: list[Call], first_id: int) -> dict:
    """The assistant's message; ids are of nine characters, which Mistral's templates insist on."""
    listed = [
        {"type": "function", "id": f"{first_id + i:09d}", "function": {"name": call.name, "arguments": call.arguments}}
        for i, call in enumerate(calls)
    ]
    return {"role": "assistant", "content": text, "tool_calls": listed}


def as_text(call: Call, result: str) -> str:
    """A result where no role is there for it."""
    return (
        f"<tool_response>\n{json.dumps({'name': call.name, 'content': result}, ensure_ascii=False)}\n</tool_response>"
    )


def _from_json(text: str) -> Call:
    values, rest = _json_values(text)
    if not values or rest:
        return Call("", {}, f"the call is no JSON: {text[:200]!r}")
    return _from_value(values[0])


def _from_value(value: Any) -> Call:
    name = value.get("name") if isinstance(value, dict) else None
    arguments = value.get("arguments", value.get("parameters", {})) if isinstance(value, dict) else None
    if isinstance(arguments, str):  # OpenAI writes them as JSON in a string
        found, rest = _json_values(arguments)
        arguments = found[0] if found and not rest else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call("", {}, f"a call is an object with name and arguments; this is {json.dumps(value)[:200]}")
    return Call(name, arguments)


def _json_values(text: str, separators: str = " \n") -> tuple[list[Any], str]:
    """JSON values at the beginning of a text, and what is left of it."""
    decoder, values, text = json.JSONDecoder(), [], text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            break
        values.append(value)
        text = text[end:].lstrip(separators)
    return values, text
