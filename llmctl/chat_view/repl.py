"""The chat at a terminal: an editor for questions, and what the keys do."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.filters import is_searching
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from llmctl.chat import sessions, slash
from llmctl.chat.desk import Desk
from llmctl.chat_view.completer import ChatCompleter
from llmctl.chat_view.terminal import Terminal, figures
from llmctl.errors import UserError


class Repl:
    """Reads questions and commands until Ctrl-D."""

    def __init__(self, desk: Desk, terminal: Terminal):
        self.desk, self.terminal = desk, terminal
        history = sessions.state_directory() / "chat_history"
        history.touch(mode=0o600)
        self._editor = PromptSession(
            history=FileHistory(str(history)),
            completer=ChatCompleter(desk),
            complete_while_typing=False,
            enable_history_search=False,
            auto_suggest=AutoSuggestFromHistory(),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="  ",
            bottom_toolbar=self._status,
        )

    def run(self) -> None:
        with _leaving_on(signal.SIGTERM, signal.SIGHUP):
            self._greet()
            self._read()

    def _read(self) -> None:
        while True:
            try:
                line = self._editor.prompt("> ")
            except KeyboardInterrupt:  # throws away what was typed, as a shell does
                continue
            except EOFError:
                return
            if line.strip():
                self._take(line)

    def _take(self, line: str) -> None:
        with self._stoppable():
            try:
                if line.startswith("/"):
                    slash.run(self.desk, self.terminal, line)
                else:
                    self.terminal.show(self.desk.ask(line))
            except UserError as error:
                self.terminal.error(error)
            except OSError as error:  # a file that cannot be written ends no conversation
                self.terminal.error(UserError(f"{error.filename or 'a file'}: {error.strerror or error}"))
            except KeyboardInterrupt:
                self.terminal.say("stopped")

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C ends an answer behind its next token, and what was said stays; the second ends it at once."""

        def stop(number: int, frame: object) -> None:
            if self.desk.talk.should_stop:
                raise KeyboardInterrupt
            self.desk.talk.should_stop = True

        before = signal.signal(signal.SIGINT, stop)
        self.desk.talk.should_stop = False
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _greet(self) -> None:
        desk, say = self.desk, self.terminal.say
        say(f"{desk.engine.name}. Enter sends, Alt-Enter is a new line, /help lists the commands, Ctrl-D leaves.")
        if desk.engine.prompt.is_plain:
            say(
                "This model has no chat template: it reads a plain transcript, and may not answer as a chat model does."
            )
        for remark in desk.remarks:
            say(remark)
        if desk.conversation.messages:
            say(f"{len(desk.conversation.messages)} messages so far, from {desk.session_path}")

    def _status(self) -> HTML:
        talk, engine = self.desk.talk, self.desk.engine
        used = talk.last.context if talk.last is not None and self.desk.conversation.messages else 0
        context = f"context {used}" + (f"/{engine.room}" if engine.room else "")
        speed = f" · {figures(talk.last)}" if talk.last is not None else ""
        branch = "" if self.desk.conversation.branch == "main" else f" · branch {self.desk.conversation.branch}"
        return HTML("{} · {}{}{}").format(engine.name[-40:], context, speed, branch)


@contextlib.contextmanager
def _leaving_on(*signals: signal.Signals) -> Iterator[None]:
    """A signal ends the chat as an exception does, so that the terminal is as it was before."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter (which terminals send as Escape and Enter) and Ctrl-J begin a new line."""
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
