"""Answers as they should have been, in the two forms that `finetune` learns from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from llmctl.errors import UserError


def paths(prefix: str) -> tuple[Path, Path]:
    """(whole conversations that end in the correction, for supervised learning; pairs of answers, for preferences)."""
    return Path(f"{prefix}.messages.jsonl"), Path(f"{prefix}.pairs.jsonl")


def append(prefix: str, prompt: Sequence[dict], answer: str, correction: str) -> tuple[Path, Path]:
    """Keep one correction; each file gets one line, whole or not at all.

    Raises `UserError` for a correction that is empty or changes nothing.
    """
    if not correction.strip():
        raise UserError("the correction is empty", hint="/undo takes a question and its answer away")
    if correction == answer:
        raise UserError("the correction says what the answer said; nothing was kept")
    prompt = list(prompt)
    # What stood in earlier answers was not corrected, and would be learned like the rest without a weight of 0.
    given = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt]
    told, preferred = paths(prefix)
    _append(told, {"messages": [*given, {"role": "assistant", "content": correction}]})
    _append(preferred, {"prompt": prompt, "chosen": correction, "rejected": answer})
    return told, preferred


def _append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
