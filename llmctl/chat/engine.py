"""A loaded model that answers conversations: prompt, decoding with a cache that is kept, and what an answer cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from llmctl.chat.prompt import ChatPrompt
from llmctl.chat.reuse import RememberingModel
from llmctl.errors import UserError
from llmctl.generation.complete import prepare
from llmctl.generation.completion import Completion
from llmctl.generation.decode import decode
from llmctl.generation.session import Session
from llmctl.generation.settings import Sampling, resolve
from llmctl.model_settings import EngineSettings

_SEQUENCES = 1 << 10  # of random draws for each question


class ContextFull(UserError):
    """A conversation leaves no room for an answer: it has `n_tokens`, and the model reads `room`."""

    def __init__(self, n_tokens: int, room: int):
        super().__init__(
            f"the context is full: the conversation has {n_tokens} tokens, the model reads {room} with its answer",
            hint="/compact shortens it, --on-full drop-oldest drops its oldest turns, /reset begins anew",
        )
        self.n_tokens, self.room = n_tokens, room


@dataclass
class Answer:
    """One answer as it grows. `seconds` and `first_token_seconds` run from the question; both texts lack the end token.

    `raw` is the text with special tokens written out, in which tool calls are found. `context` counts prompt and answer.
    """

    prompt_tokens: int
    reused_tokens: int = 0
    text: str = ""
    raw: str = ""
    ids: list[int] = field(default_factory=list)
    seconds: float = 0.0
    first_token_seconds: float | None = None
    finish_reason: str | None = None
    is_cut_by_context: bool = False

    @property
    def context(self) -> int:
        return self.prompt_tokens + len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first, which is what reading the prompt costs."""
        after = self.seconds - (self.first_token_seconds or 0.0)
        return (len(self.ids) - 1) / after if len(self.ids) > 1 and after > 0 else 0.0


class Engine:
    """`name` is the path it was opened from. Answers of one engine share its cache."""

    def __init__(self, session: Session, name: str = "the model", chat_template: str | None = None):
        if not session.continues_prompts:
            raise UserError(
                f"{session.model.config.family} turns one text into another and holds no conversations",
                hint="llmctl generate answers single prompts with it",
            )
        self.session, self.name = session, name
        self.prompt = ChatPrompt(session.tokenizer, chat_template)
        self.model = RememberingModel(session.model)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        how: EngineSettings,
        adapters: Sequence[str] = (),
        force: bool = False,
        chat_template: str | None = None,
    ) -> Engine:
        return cls(Session.open_as(path, how, adapters, force), str(path), chat_template)

    @property
    def tokenizer(self):
        return self.prompt.tokenizer

    @property
    def room(self) -> int | None:
        """Tokens that the model can read; None where there is no end."""
        config = self.session.model.config
        n_virtual = getattr(self.session.model, "n_virtual", 0)
        return None if config.max_positions is None else config.max_positions - n_virtual

    def count(self, messages: Sequence[dict], tools: Sequence[dict] | None = None) -> int:
        """Tokens of the prompt that these messages make."""
        return len(self.prompt.ids(self.prompt.text(messages, tools)))

    def fits(self, n_tokens: int, max_new_tokens: int) -> bool:
        """Whether a prompt leaves room for an answer: the one asked for, or a quarter of the context if that is less."""
        return self.room is None or n_tokens + min(max_new_tokens, self.room // 4) <= self.room

    def answer(
        self,
        messages: Sequence[dict],
        sampling: Sampling,
        tools: Sequence[dict] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        sequence: int = 0,
    ) -> Iterator[tuple[str, Answer]]:
        """Pieces of the text with the answer so far, which is complete with the last one. `should_stop` is asked after each token.

        Raises `ContextFull` and `UserError` for a conversation that the template refuses.
        """
        began = time.monotonic()
        text = self.prompt.text(messages, tools)
        completion = self._begin(text, sampling, sequence)
        answer = Answer(len(completion.prompt_ids))
        reused, n_shown = self.model.n_reused, 0
        for _ in decode(self.model, [completion]):
            answer.reused_tokens = self.model.n_reused - reused
            _update(answer, completion, began)
            if piece := completion.take_text():
                n_shown += len(piece)
                yield piece, answer
            if should_stop():
                break
        self._finish(answer, completion, text)
        yield answer.text[n_shown:], answer

    def samples(
        self,
        messages: Sequence[dict],
        sampling: Sampling,
        n: int,
        should_stop: Callable[[], bool] = lambda: False,
        sequence: int = 0,
    ) -> list[Answer]:
        """N answers to the same conversation, drawn together behind one reading of it; empty when stopped."""
        began = time.monotonic()
        text = self.prompt.text(messages)
        completions = [self._begin(text, sampling, sequence * _SEQUENCES + i) for i in range(n)]
        for _ in decode(self.model, completions):
            if should_stop():
                return []
        answers = []
        for completion in completions:
            answer = Answer(len(completion.prompt_ids))
            _update(answer, completion, began)
            self._finish(answer, completion, text)
            answers.append(answer)
        return answers

    def _begin(self, text: str, sampling: Sampling, sequence: int = 0) -> Completion:
        session, ids = self.session, self.prompt.ids(text)
        resolved = resolve(sampling, session.recommended)
        resolved = replace(resolved, stop=(*resolved.stop, *self.prompt.stops))
        if not self.fits(len(ids), resolved.max_new_tokens):
            raise ContextFull(len(ids), self.room)
        return prepare(
            session.model, ids, resolved, sequence=sequence, marks=session.marks, tokenizer=self.tokenizer,
            name="the conversation",
        )  # fmt: skip

    def _finish(self, answer: Answer, completion: Completion, text: str) -> None:
        ids = completion.ids
        if completion.finish_reason is None:
            answer.finish_reason = "interrupted"
        else:
            answer.finish_reason, answer.is_cut_by_context = completion.finish_reason, completion.is_cut_by_context
        answer.text = completion.text
        said = [token for token in ids if token not in completion.marks.ends]
        answer.ids, answer.raw = list(ids), self.tokenizer.decode(said, skip_special_tokens=False)
        is_cut = completion.finish_reason == "stop" and len(said) == len(
            ids
        )  # by a stop text, which the ids still have
        if not is_cut:
            self.prompt.remember(text, completion.prompt_ids, answer.text, said)


def _update(answer: Answer, completion: Completion, began: float) -> None:
    answer.ids = completion.ids
    answer.seconds = time.monotonic() - began
    if completion.first_token_at is not None:
        answer.first_token_seconds = completion.first_token_at - began
