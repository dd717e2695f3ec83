"""Votes between two answers, as JSON Lines: whose answer stood first, and which one was better."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.files import read_lines

CHOICES = ("1", "2", "tie", "both bad")
"""Which answer is better, in the order in which they were shown."""


@dataclass(frozen=True)
class Vote:
    """`score` is what the first model gets: 1, 0, or a half where neither answer is better."""

    first: str
    second: str
    score: float


def append(
    path: str | os.PathLike, messages: Sequence[dict], models: Sequence[str], answers: Sequence[str], said: str
) -> None:
    """Keep a vote on two answers, all in the order in which they were shown."""
    row = {"messages": list(messages), "models": list(models), "answers": list(answers), "vote": said}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read(path: str | os.PathLike) -> list[Vote]:
    """Raises `UserError` naming the line, and where there is none."""
    try:
        lines = read_lines(path)
    except UserError as error:
        raise UserError(error.message, hint="llmctl arena A B --prompts F asks for votes") from error
    votes = [_vote(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not votes:
        raise UserError(f"{path}: no votes in it")
    return votes


def _vote(line: bytes, name: str) -> Vote:
    try:
        row: Any = json.loads(line)
        (first, second), said = row["models"], row["vote"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{name}: expected an object with two "models" and a "vote"') from error
    if said not in CHOICES:
        raise UserError(f"{name}: the vote is {said!r}; expected one of {', '.join(CHOICES)}")
    return Vote(str(first), str(second), {"1": 1.0, "2": 0.0}.get(said, 0.5))
