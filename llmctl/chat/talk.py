"""One conversation with one model: a question goes in, events come out, and the messages grow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmctl.chat.choosing import Chooser
from llmctl.chat.conversation import Conversation
from llmctl.chat.engine import Answer, ContextFull, Engine
from llmctl.chat.events import Calls, Done, Event, Found, Piece, Remark
from llmctl.chat.prompt import defused, fitting
from llmctl.chat.tool_turns import ToolLayer
from llmctl.generation.settings import DEFAULTS, Sampling
from llmctl.retrieval.quoting import question_with

if TYPE_CHECKING:
    from llmctl.chat.tools.calls import Said
    from llmctl.retrieval.index import Index

MAX_ROUNDS = 8  # of calls and results for one question
_INTERRUPTED = "interrupted"
_NOTHING = "stopped before anything was said; the question is not kept"


class Talk:
    """`sampling` has a seed; each answer draws by the next sequence of it, so that the same commands give the same text."""

    def __init__(
        self,
        engine: Engine,
        conversation: Conversation,
        sampling: Sampling,
        on_full: str = "stop",
        tools: ToolLayer | None = None,
        index: Index | None = None,
        n_passages: int = 3,
        chooser: Chooser | None = None,
    ):
        self.engine, self.conversation, self.sampling, self.on_full = engine, conversation, sampling, on_full
        self.tools, self.index, self.n_passages, self.chooser = tools, index, n_passages, chooser
        self.should_stop = False
        self.last: Answer | None = None
        self._n_answers = 0

    def ask(self, question: str, attached: Sequence[tuple[str, str]] = ()) -> Iterator[Event]:
        """Answer a question, with attached files as (name, text). Where it cannot be, it is not kept."""
        before = list(self.conversation.messages)
        with self.kept_if_answered(before):
            yield from self._add_question(question, attached)
            yield from self.answer()

    @contextlib.contextmanager
    def kept_if_answered(self, before: list[dict]) -> Iterator[None]:
        """The messages are `before` again where what happens here ends without an answer."""
        try:
            yield
        finally:
            if self.conversation.messages[-1:] and self.conversation.messages[-1]["role"] != "assistant":
                self.conversation.messages = before

    def answer(self) -> Iterator[Event]:
        """Answer the last message, calling tools as long as the model asks for them."""
        self.should_stop = False
        yield from self._make_room()
        if self.chooser is not None:
            yield from self._chosen()
            return
        for _ in range(MAX_ROUNDS):
            answer = None
            for piece, answer in self._stream():
                yield Piece(piece, answer)
            said = self.tools.parse(answer.raw) if self.tools and answer.finish_reason != _INTERRUPTED else None
            if said is None or not said.calls:
                yield from self._finished(answer)
                return
            yield Calls(said.calls)
            yield from self._call(answer.raw, said)
            yield from self._make_room()
        yield Remark(f"the model called tools {MAX_ROUNDS} times without an answer; the question is not kept")

    def next_sequence(self) -> int:
        self._n_answers += 1
        return self._n_answers - 1

    def messages(self) -> list[dict]:
        """What the model reads: with the tools described where its template does not describe them."""
        messages = self.conversation.messages
        described = self.tools.system_text if self.tools else None
        if described is None:
            return messages
        own = self.conversation.system
        content = f"{own}\n\n{described}" if own else described
        return [{"role": "system", "content": content}, *messages[own is not None :]]

    @property
    def schemas(self) -> list[dict] | None:
        return self.tools.schemas if self.tools else None

    def _stream(self) -> Iterator[tuple[str, Answer]]:
        return self.engine.answer(
            self.messages(), self.sampling, self.schemas, lambda: self.should_stop, self.next_sequence()
        )

    def _add_question(self, question: str, attached: Sequence[tuple[str, str]]) -> Iterator[Event]:
        tokenizer, room = self.engine.tokenizer, self.engine.room
        sources = [(name, defused(text, tokenizer)) for name, text in attached]
        if self.index is not None:
            passages = self.index.search(question, self.n_passages)
            found = [(passage.source, defused(passage.text, tokenizer)) for passage in passages]
            found = found if room is None else fitting(found, tokenizer, room // 2)
            yield Found(passages[: len(found)])
            if len(found) < len(passages):
                yield Remark(f"half of the context has room for {len(found)} of {len(passages)} passages")
            sources += found
        if sources:
            content = question_with(question, sources)
            self.conversation.add("user", content, question=question, from_elsewhere=True)
        else:
            self.conversation.add("user", question)

    def _make_room(self) -> Iterator[Event]:
        """Drop the oldest turns if that is wanted. Raises `ContextFull` where an answer has no room."""
        limit = (
            self.sampling.max_new_tokens or self.engine.session.recommended.max_new_tokens or DEFAULTS.max_new_tokens
        )
        n_dropped = 0
        while not self.engine.fits(n_tokens := self.engine.count(self.messages(), self.schemas), limit):
            gone = self.conversation.drop_oldest() if self.on_full == "drop-oldest" else 0
            if not gone:
                raise ContextFull(n_tokens, self.engine.room)
            n_dropped += gone
        if n_dropped:
            yield Remark(f"the context was full: the {n_dropped} oldest messages were dropped")

    def _call(self, raw: str, said: Said) -> Iterator[Event]:
        message = self.tools.message(raw, said)
        self.conversation.messages.append(message)
        for happened, result in self.tools.results(message, said.calls, self.conversation.messages):
            self.conversation.messages.append(result)
            yield happened

    def _chosen(self) -> Iterator[Event]:
        n, sequence = self.chooser.n, self.next_sequence()
        answers = self.engine.samples(self.messages(), self.sampling, n, lambda: self.should_stop, sequence)
        if not answers:
            yield Remark(_NOTHING)
            return
        chosen, words = self.chooser.choose(self.conversation.messages, answers)
        yield Remark(words)
        yield Piece(chosen.text, chosen)
        yield from self._finished(chosen)

    def _finished(self, answer: Answer) -> Iterator[Event]:
        self.last = answer
        if not answer.text and answer.finish_reason == _INTERRUPTED:
            yield Remark(_NOTHING)
            return
        self.conversation.add("assistant", answer.text)
        if answer.is_cut_by_context:
            yield Remark("the answer stopped where the model's context ends; /compact makes room")
        yield Done(answer)
