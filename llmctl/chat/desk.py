"""Everything that a person at a chat has before them: the talk, its file, attachments, and what the slash commands change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from llmctl.chat import sessions
from llmctl.chat.conversation import Conversation
from llmctl.chat.engine import Engine
from llmctl.chat.events import Done, Event
from llmctl.chat.settings import ChatSettings
from llmctl.chat.talk import Talk
from llmctl.chat.tool_turns import Approve, ToolLayer
from llmctl.chat.tools.toolbox import Toolbox, named
from llmctl.errors import CalledWrongly, UserError
from llmctl.generation.settings import Sampling

_SHARE = 4  # of the context, for one result of a tool


class View(Protocol):
    """What the slash commands ask of whoever stands between them and a person."""

    def say(self, text: str) -> None: ...

    def show(self, events: Iterator[Event]) -> None: ...

    def edit(self, label: str, text: str) -> str | None:
        """The text as the person has changed it; None where they thought better of it."""

    def pick(self, label: str, choices: Sequence[str]) -> str | None: ...


class Desk:
    """`attached` waits for the next question. `approve` asks a person about calls of tools; None where there is nobody.

    `report` is told how far the index of --docs is.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ChatSettings,
        sampling: Sampling,
        approve: Approve | None = None,
        report: Callable[[int, str], None] = lambda n, note: None,
    ):
        self.settings, self.approve = settings, approve
        self.adapters: list[str] = list(settings.adapter)
        self.attached: list[tuple[str, str]] = []
        self.toolbox: Toolbox | None = toolbox_of(settings)
        self.session_path: Path | None = None
        self.remarks: list[str] = []
        self.talk = Talk(
            engine, self._first_conversation(engine), sampling, settings.on_full, n_passages=settings.passages
        )
        self.talk.index, self.talk.chooser = index_of(settings, report), chooser_of(settings)
        self.use_tools(self.toolbox)

    @property
    def engine(self) -> Engine:
        return self.talk.engine

    @property
    def conversation(self) -> Conversation:
        return self.talk.conversation

    def open(self, path: str, adapters: Sequence[str] = ()) -> Engine:
        """Another model, with this chat's settings. Raises `UserError` where there is none."""
        if not Path(path).exists():
            raise UserError(f"{path}: no such checkpoint", hint="give the path of a local checkpoint directory")
        return engine_of(path, self.settings, adapters)

    def use(self, engine: Engine) -> None:
        """Go on with another model; what was said stays. Raises `UserError` where its template refuses that."""
        if self.conversation.messages:
            engine.prompt.text(self.conversation.messages)
        self.talk.engine = engine
        self.use_tools(self.toolbox)

    def use_tools(self, toolbox: Toolbox | None) -> None:
        self.toolbox = toolbox
        room = self.engine.room
        limit = None if room is None else room // _SHARE
        self.talk.tools = ToolLayer(toolbox, self.engine.tokenizer, self.approve, limit) if toolbox else None

    def change_sampling(self, changes: dict) -> None:
        self.talk.sampling = dataclasses.replace(self.talk.sampling, **changes)

    def ask(self, question: str) -> Iterator[Event]:
        """Answer a question with what is attached, which waits for the next one where this one was not kept."""
        for event in self.talk.ask(question, self.attached):
            if isinstance(event, Done):
                self.attached = []
            yield event
        self.save()

    def answer_again(self, before: list[dict]) -> Iterator[Event]:
        """Answer the last question; the messages are `before` again where that comes to nothing."""
        with self.talk.kept_if_answered(before):
            yield from self.talk.answer()
        self.save()

    def save(self) -> None:
        """Keep the conversation, where it has a place."""
        if self.session_path is not None and self.conversation.messages:
            sessions.save(self.conversation, self.session_path, self.engine.name, self.engine.prompt.template)

    def load(self, path: Path) -> list[str]:
        """Go on with a kept conversation; gives what a person should know of it."""
        conversation, remarks = sessions.load(path, self.engine.prompt.template)
        self.engine.prompt.text(conversation.messages)
        self.talk.conversation = conversation
        return remarks

    def _first_conversation(self, engine: Engine) -> Conversation:
        settings, conversation = self.settings, Conversation()
        if settings.continue_:
            self.session_path = Path(settings.session) if settings.session else sessions.last_session_path()
            conversation, self.remarks = sessions.load(self.session_path, engine.prompt.template)
            engine.prompt.text(conversation.messages)
        elif settings.session:
            self.session_path = Path(settings.session)
            if self.session_path.exists():
                raise CalledWrongly(f"{settings.session}: exists already", hint="--continue goes on with it")
        if settings.system is not None:
            conversation.set_system(settings.system)
        return conversation


def engine_of(path: str, settings: ChatSettings, adapters: Sequence[str]) -> Engine:
    return Engine.open(path, settings, adapters, settings.force, settings.chat_template)


def toolbox_of(settings: ChatSettings) -> Toolbox | None:
    return named(settings.tools, settings.files_dir, settings.tool_seconds, settings.tool_megabytes)


def index_of(settings: ChatSettings, report: Callable[[int, str], None]):
    """The index of --docs, brought up to date; None without it."""
    if settings.docs is None:
        return None
    from llmctl.retrieval.index import Index, update

    update(settings.docs, settings.embed_model, report=report)
    return Index.open(settings.docs, settings.embed_model)


def chooser_of(settings: ChatSettings):
    """How one of several answers is chosen; None for one answer."""
    from llmctl.chat.choosing import BestOf, Reward, Vote

    if settings.best_of > 1:
        return BestOf(settings.best_of, Reward(settings.reward, settings.asked_dtype, settings.device))
    return Vote(settings.samples) if settings.vote else None


def check(settings: ChatSettings) -> None:
    """Raises `CalledWrongly` for flags that contradict each other, before anything is loaded."""
    if (settings.best_of > 1) != (settings.reward is not None):
        raise CalledWrongly("--best-of N and --reward MODEL belong together")
    if (settings.samples > 1) != settings.vote:
        raise CalledWrongly("--samples N and --vote belong together")
    if settings.vote and settings.best_of > 1:
        raise CalledWrongly("--vote and --best-of each choose the answer", hint="leave one of them out")
    if settings.tools and (settings.vote or settings.best_of > 1):
        raise CalledWrongly("--tools are for one answer, not for several samples of it")
    if settings.embed_model and not settings.docs:
        raise CalledWrongly("--embed-model finds passages of --docs, which is not given")
    if settings.docs and not Path(settings.docs).is_dir():
        raise CalledWrongly(f"--docs {settings.docs}: no such directory")
    toolbox_of(settings)
