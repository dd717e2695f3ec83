"""What the tab key offers: the slash commands, their paths, and the names that they take."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from llmctl.chat import slash
from llmctl.chat.desk import Desk
from llmctl.generation.settings import Sampling

_TAKE_PATHS = ("attach", "load", "save", "model", "adapter", "compare")


class ChatCompleter(Completer):
    def __init__(self, desk: Desk):
        self.desk, self._paths = desk, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, space, words = line[1:].partition(" ")
        if not space:
            for known in sorted(slash.names()):
                if known.startswith(name):
                    form, _, meaning = slash.usage(known).partition("  ")
                    behind = " " if " " in form else ""
                    yield Completion(known + behind, -len(name), display=f"/{known}", display_meta=meaning)
        elif name in _TAKE_PATHS:
            yield from self._paths.get_completions(Document(words), complete_event)
        else:
            last = words.replace(",", " ").rpartition(" ")[2]
            for word in self._words(name):
                if word.startswith(last):
                    yield Completion(word, -len(last))

    def _words(self, name: str) -> list[str]:
        if name == "params":
            return [f"{field.replace('_', '-')}=" for field in Sampling.__dataclass_fields__]
        if name == "tools":
            return ["calculator", "python", "files"]
        return self.desk.conversation.names() if name == "branch" else []
