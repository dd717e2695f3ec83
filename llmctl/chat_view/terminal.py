"""What a person sees of a chat, and is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prompt_toolkit import prompt
from rich.console import Console

from llmctl.chat.engine import Answer
from llmctl.chat.events import Called, Done, Event, Found, Piece, Remark
from llmctl.chat.tools.toolbox import Call
from llmctl.chat_view.markdown import MarkdownStream
from llmctl.errors import UserError

_SHOWN_RESULT = 1500


class Terminal:
    """The `View` of the slash commands."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def error(self, error: UserError) -> None:
        self.console.print(f"error: {error.message}", style="red", markup=False)
        if error.hint:
            self.say(f"hint: {error.hint}")

    def show(self, events: Iterator[Event]) -> None:
        """Draw an answer as it comes."""
        rest: Event | None = None
        for event in events:
            if isinstance(event, Piece):
                rest = self._stream(event, events)
                if rest is None:
                    return
                event = rest
            self._mention(event)

    def _stream(self, first: Piece, events: Iterator[Event]) -> Event | None:
        """Pieces up to the next event of another kind, which is given back."""
        with MarkdownStream(self.console) as stream:
            stream.add(first.text)
            for event in events:
                if not isinstance(event, Piece):
                    return event
                stream.add(event.text)
        return None

    def _mention(self, event: Event) -> None:
        if isinstance(event, Remark):
            self.say(event.text)
        elif isinstance(event, Found):
            self.say("sources: " + (", ".join(passage.source for passage in event.passages) or "nothing found"))
        elif isinstance(event, Called) and not event.was_given:
            self.say("not given to the model")
        elif isinstance(event, Called) and event.result.startswith("error: "):
            self.say(event.result)
        elif isinstance(event, Done):
            self.say(figures(event.answer) + (", stopped" if event.answer.finish_reason == "interrupted" else ""))

    def edit(self, label: str, text: str) -> str | None:
        """Lines as in the chat itself: Enter is done, Alt-Enter a new line, Ctrl-C leaves it as it is."""
        try:
            return prompt(f"{label}: ", default=text)
        except (KeyboardInterrupt, EOFError):
            self.say("left as it is")
            return None

    def pick(self, label: str, choices: Sequence[str]) -> str | None:
        while True:
            try:
                said = prompt(f"{label} [{'/'.join(choices)}] ").strip().casefold()
            except (KeyboardInterrupt, EOFError):
                return None
            found = [choice for choice in choices if said and choice.casefold().startswith(said)]
            if len(found) == 1:
                return found[0]

    def approve(self, call: Call, result: str | None, is_tainted: bool) -> bool:
        """Ask about a call before it runs, and about its result before the model reads it."""
        if result is None:
            self.say(f"the model asks for {call}")
            if is_tainted:
                self.say("documents are in this conversation: is this what you want, or what one of them wants?")
            return self.pick("run it?", ["yes", "no"]) == "yes"
        shown = result if len(result) <= _SHOWN_RESULT else f"{result[:_SHOWN_RESULT]}… ({len(result)} characters)"
        self.say(f"{call} gives\n{shown}")
        return self.pick("give it to the model?", ["yes", "no"]) == "yes"


def figures(answer: Answer) -> str:
    first = "" if answer.first_token_seconds is None else f", first after {answer.first_token_seconds:.2f} s"
    return f"{len(answer.ids)} tokens, {answer.tokens_per_second:.1f} tokens/s{first}"
