"""Two models answer the same messages side by side, in an order that nobody knows."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmctl.chat.engine import Engine
from llmctl.errors import UserError
from llmctl.files import read_lines
from llmctl.finetune.data.messages import from_openai
from llmctl.generation.settings import Sampling


@dataclass(frozen=True)
class Pair:
    """`models` and `answers` are in the order in which they are shown."""

    messages: list[dict]
    models: tuple[str, str]
    answers: tuple[str, str]


def pair(
    engines: Sequence[Engine], messages: list[dict], sampling: Sampling, order: random.Random, sequence: int = 0
) -> Pair:
    answers = []
    for engine in engines:
        *_, (_, answer) = engine.answer(messages, sampling, sequence=sequence)
        answers.append((engine.name, answer.text))
    order.shuffle(answers)
    (first, said), (second, said_too) = answers
    return Pair(list(messages), (first, second), (said, said_too))


def read_prompts(path: str | os.PathLike) -> Iterator[list[dict]]:
    """Messages from lines of text or of JSON with prompt or messages. Raises `UserError` naming the line."""
    lines = read_lines(path)
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: no questions in it")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _messages(line, f"{path}: line {number}")


def _messages(line: bytes, name: str) -> list[dict]:
    try:
        text = line.decode()
        value = json.loads(text) if text.lstrip().startswith("{") else {"prompt": text}
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON in UTF-8 ({error})") from error
    try:
        if "messages" in value:
            messages = from_openai(value["messages"])
            # A row that was made to learn from ends in the answer that it teaches.
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            if not messages:
                raise UserError("an answer without a question")
            return messages
        prompt = value.get("prompt", value.get("question"))
        if not isinstance(prompt, str):
            raise UserError("expected prompt (text) or messages")
        return from_openai([{"role": "user", "content": prompt}])
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.hint) from error
