"""What goes in and comes out: prompts as text or JSON Lines, completions as JSON Lines."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from llmctl.errors import UserError
from llmctl.generation.settings import Sampling

if TYPE_CHECKING:
    from llmctl.generation.completion import Completion, TokenLogprob
    from llmctl.tokenizer import Tokenizer


@dataclass(frozen=True)
class Row:
    """One prompt with its own settings; `rest` are keys that mean nothing here and come out as they went in."""

    prompt: str
    sampling: Sampling = field(default_factory=Sampling)
    rest: dict[str, Any] = field(default_factory=dict)
    name: str = "the prompt"


@dataclass(frozen=True)
class Answer:
    """A finished completion and where it belongs: the row's place in the input and which of its samples this is."""

    index: int
    sample: int
    row: Row
    completion: Completion

    def text(self, echo: bool) -> str:
        """For a person: the continuation, with the prompt in front of it, and a line that sets further samples apart."""
        separator = "---\n" if self.sample else ""
        return separator + (self.row.prompt if echo else "") + self.completion.text

    def json_line(self, tokenizer: Tokenizer) -> str:
        """Keys of the row that mean nothing here stay, but give way to ours."""
        completion = self.completion
        content = {
            **self.row.rest,
            "index": self.index,
            "sample": self.sample,
            "prompt": self.row.prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(completion.prompt_ids),
            "completion_tokens": len(completion.ids),
            "seed": completion.sampling.seed,
        }
        if completion.score is not None:
            content["score"] = round(completion.score, 6)
        if completion.sampling.logprobs is not None:
            content["logprobs"] = [_logprob(entry, tokenizer) for entry in completion.logprobs]
        return json.dumps(content, ensure_ascii=False)


def read_text(stream: BinaryIO) -> Row:
    """A whole stream as one prompt, without the newline that ends it. Raises `UserError` where it is empty or not UTF-8."""
    content = stream.read()
    if not content:
        raise UserError("standard input is empty; expected a prompt", hint='--prompt "" begins a new text')
    try:
        return Row(content.decode().removesuffix("\n"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}"
        ) from error


def read_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Each line a JSON object with "prompt" and any setting; blank lines are skipped. Raises `UserError` naming the line."""
    is_empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        is_empty = False
        try:
            content = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number}: not valid JSON ({error})") from error
        if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
            raise UserError(f'line {number}: expected an object with a text under "prompt"')
        yield _row(content, f"line {number}")
    if is_empty:
        raise UserError("standard input is empty; expected one JSON object per line")


def _row(content: dict[str, Any], name: str) -> Row:
    known = [item.name for item in dataclasses.fields(Sampling)]
    settings, rest = {}, {}
    for key, value in content.items():
        setting = key.replace("-", "_")
        if setting in known:
            settings[setting] = value
            continue
        near = difflib.get_close_matches(setting, known, n=1, cutoff=0.8)
        if near:
            raise UserError(f"{name}: unknown key {key!r}", hint=f"did you mean {near[0]!r}?")
        rest[key] = value
    prompt = rest.pop("prompt")
    try:
        return Row(prompt, Sampling(**settings), rest, name)
    except UserError as error:
        raise UserError(f"{name}: {error.message}") from error


def _logprob(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_bytes(token).decode("utf-8", "replace")
        return {"id": token, "token": text, "logprob": round(logprob, 6)}

    top = [named(token, logprob) for token, logprob in entry.top]
    return {**named(entry.token, entry.logprob), "top": top}
