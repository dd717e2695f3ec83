"""One prompt and what has been generated for it: ids, text, and when to stop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmctl.generation.settings import NO_MARKS, Marks, Sampling

if TYPE_CHECKING:
    from llmctl.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural-log probability under the model itself, before temperature or any other setting."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place with theirs, the best first."""


class Completion:
    """Grows by `push`, one token at a time, until `finish_reason` is set.

    `text` is what a reader gets: it ends before a stop text or the end-of-text token. `ids` are all the tokens drawn.
    `finish_reason` is "stop" (an end-of-text token or a stop text) or "length". The new tokens follow `continued`: the
    prompt, or what a decoder reads first whose encoder reads the prompt. A search gives the text's `score`, and of its
    `n_best` texts the others as `runners_up`.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        sequence: int,
        max_new_tokens: int,
        marks: Marks = NO_MARKS,
        tokenizer: Tokenizer | None = None,
        continued: Sequence[int] | None = None,
    ):
        self.prompt_ids = list(prompt_ids)
        self.continued = self.prompt_ids if continued is None else list(continued)
        self.sampling = sampling
        self.sequence = sequence
        self.max_new_tokens = max_new_tokens
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: Literal["stop", "length"] | None = None
        self.marks = dataclasses.replace(marks, ends=frozenset(), last=None) if sampling.ignore_eos else marks
        self.n_best = 1
        self.score: float | None = None
        self.runners_up: list[Completion] = []
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder(after=self.continued) if tokenizer else None
        self.first_token_at: float | None = None
        self._taken = 0

    def another(self) -> Completion:
        """One of the same prompt and settings that has yet to begin."""
        settings = (self.sampling, self.sequence, self.max_new_tokens, self.marks)
        return Completion(self.prompt_ids, *settings, self._tokenizer, self.continued)

    @property
    def is_cut_by_context(self) -> bool:
        """Whether the model's context ended it before the length that was asked for."""
        return self.finish_reason == "length" and len(self.ids) < self.sampling.max_new_tokens

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        if not self.ids:
            self.first_token_at = time.monotonic()
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.marks.ends:
            self._append(self._flush())
            self.finish_reason = "stop"
            return
        self._append(self._decoder.push(token) if self._decoder else "")
        if self.finish_reason is None and len(self.ids) >= self.max_new_tokens:
            self._append(self._flush())
            self.finish_reason = self.finish_reason or "length"

    def take_text(self) -> str:
        """The text that came since the last call and is sure to stay: no part of what may become a stop text."""
        end = len(self.text)
        if self.finish_reason is None:
            end -= max((_overlap(self.text, stop) for stop in self.sampling.stop), default=0)
        piece = self.text[self._taken : end]
        self._taken = max(end, self._taken)
        return piece

    def _flush(self) -> str:
        return self._decoder.flush() if self._decoder else ""

    def _append(self, piece: str) -> None:
        longest = max(map(len, self.sampling.stop), default=1)
        search_from = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [self.text.find(stop, search_from) for stop in self.sampling.stop]
        first = min((at for at in found if at >= 0), default=None)
        if first is not None:
            self.text = self.text[:first]
            self.finish_reason = "stop"


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
