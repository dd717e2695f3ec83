"""Conversations on disk: JSON Lines of `messages`, one row per branch, which `finetune` reads as they are."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from llmctl.chat.conversation import MAIN, Conversation
from llmctl.errors import UserError
from llmctl.files import read_lines, write_atomic
from llmctl.finetune.data.messages import from_openai

STATE_VARIABLE = "XDG_STATE_HOME"


def state_directory() -> Path:
    """Where histories and conversations are kept that nobody gave a place; only its owner may look into it."""
    place = Path(os.environ.get(STATE_VARIABLE) or Path.home() / ".local" / "state") / "llmctl"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


def new_session_path() -> Path:
    return state_directory() / "chats" / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.jsonl"


def last_session_path() -> Path:
    """Raises `UserError` where no conversation was kept yet."""
    found = sorted((state_directory() / "chats").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise UserError(f"no conversation to go on with in {state_directory() / 'chats'}", hint="leave out --continue")
    return found[-1]


def template_id(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()[:12]


def save(conversation: Conversation, path: str | os.PathLike, model: str, template: str) -> None:
    """The current branch is the last row. A branch in which nothing was said has no row."""
    branches = {**conversation.others, conversation.branch: conversation.messages}
    rows = [
        {"messages": messages, "branch": name, "model": model, "chat_template": template_id(template)}
        for name, messages in branches.items()
        if messages
    ]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def load(path: str | os.PathLike, template: str) -> tuple[Conversation, list[str]]:
    """The conversation of a file, and what a person should know of it. Raises `UserError` naming the line."""
    rows = [_row(line, f"{path}: line {number}") for number, line in enumerate(read_lines(path), 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: no conversation in it")
    names: dict[str, list[dict]] = {}
    for number, (messages, row) in enumerate(rows):
        name = str(row.get("branch") or (MAIN if len(rows) == 1 else f"line{number + 1}"))
        names[name] = messages
    current = list(names)[-1]
    conversation = Conversation(names.pop(current), current, names)
    return conversation, _remarks(rows[-1][1], template, path)


def _row(line: bytes, name: str) -> tuple[list[dict], dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(row, dict) or "messages" not in row:
        raise UserError(f'{name}: expected an object with "messages"')
    try:
        return _messages(row["messages"]), row
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.hint) from error


def _messages(value: Any) -> list[dict]:
    """As for training, but a model may have answered nothing."""
    turns = value if isinstance(value, list) else []
    silent = {i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("content") == ""}
    checked = from_openai([{**turn, "content": " "} if i in silent else turn for i, turn in enumerate(turns)])
    return [{**message, "content": ""} if i in silent else message for i, message in enumerate(checked)]


def _remarks(row: dict[str, Any], template: str, path: object) -> list[str]:
    theirs = row.get("chat_template")
    if theirs is None or theirs == template_id(template):
        return []
    return [
        f"{path} was held with the chat template of {row.get('model', 'another model')}; it is rendered with this model's"
    ]
