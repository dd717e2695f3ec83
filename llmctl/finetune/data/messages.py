"""Conversations in the one form that chat templates take: OpenAI's messages with plain text as content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What may stand in front of a turn; None is the beginning.
_BEFORE = {
    "system": {None},
    "developer": {None},
    "user": {None, "system", "developer", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def from_openai(value: Any, name: str = "messages") -> list[dict]:
    """Messages with text as content and tool calls with their arguments as objects. Raises `UserError`."""
    turns = _list(value, name)
    return [_message(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]


def from_sharegpt(value: Any, name: str = "conversations") -> list[dict]:
    """The same from turns of `from` and `value`; turns of `role` and `content` pass as they are."""
    turns = _list(value, name)
    messages = []
    for number, turn in enumerate(turns):
        place = f"{name}[{number}]"
        if isinstance(turn, dict) and "from" in turn:
            turn = _from_pair(turn, place)
        messages.append(_message(turn, place))
    return messages


def tools_of(value: Any) -> list[dict] | None:
    """The tools that a row offers, which may be written as a JSON string."""
    tools = _from_json(value, "tools") if isinstance(value, str) and value.strip() else value
    if tools and not isinstance(tools, list):
        raise UserError(f"tools: expected a list, got {type(tools).__name__}")
    return [_without_nulls(tool) for tool in tools] if tools else None


def check_order(messages: Sequence[Mapping]) -> None:
    """Raise `UserError` unless system comes first, users and assistant take turns, and tools answer a call."""
    before = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in _BEFORE[role]:
            where = f"follows {before}" if before else "comes first"
            raise UserError(f"roles out of order: turn {number} ({role}) {where}")
        if role == "tool" and before == "assistant" and not messages[number - 2].get("tool_calls"):
            raise UserError(f"roles out of order: turn {number} (tool) answers no tool call")
        before = role


def _list(value: Any, name: str) -> list:
    if isinstance(value, str):
        value = _from_json(value, name)
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type(value).__name__
        raise UserError(f"{name}: expected a list of turns, got {what}")
    return value


def _message(turn: Any, place: str) -> dict:
    if not isinstance(turn, dict) or "role" not in turn:
        raise UserError(f"{place}: expected role and content")
    message = _without_nulls(turn)
    if message["role"] not in ROLES:
        raise UserError(f"{place}: unknown role {message['role']!r}", hint=f"the roles are {', '.join(ROLES)}")
    message["content"] = _content(message.get("content"), place)
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, place) for call in message["tool_calls"]]
    elif not message["content"] and message["role"] != "tool":
        raise UserError(f"{place}: the {message['role']}'s turn is empty")
    return message


def _content(value: Any, place: str) -> str:
    """Text, or parts of text joined."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise UserError(f"{place}: expected text as content, got {type(value).__name__}")
    for part in value:
        if not isinstance(part, (str, dict)) or (isinstance(part, dict) and not isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{place}: a part of type {kind!r}; only text can be trained on")
    return "".join(part if isinstance(part, str) else part["text"] for part in value)


def _tool_call(call: Any, place: str) -> dict:
    """The call with its arguments as an object, which templates expect and OpenAI writes as a string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{place}: a tool call without a function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", f"{place}: the arguments of {function['name']}")
    function = {**function, "arguments": arguments}
    return {**call, "type": "function", "function": function} if "function" in call else {
        "type": "function", "function": function
    }  # fmt: skip


def _from_pair(turn: dict, place: str) -> dict:
    role = _SHAREGPT.get(turn["from"])
    if role is None:
        raise UserError(f"{place}: unknown role {turn['from']!r}", hint=f"known are {', '.join(_SHAREGPT)}")
    value = turn.get("value")
    rest = {key: part for key, part in turn.items() if key not in ("from", "value")}
    if turn["from"] != "function_call":
        return {"role": role, "content": value, **rest}
    calls = _from_json(value, place) if isinstance(value, str) else value
    return {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _without_nulls(value: Any) -> Any:
    """Columns of parquet give every struct all the fields that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not JSON: {error.msg} at column {error.colno}") from error
