"""From an example to its text and to the characters of it that are learned: found by position, never by what is there."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass

from llmctl.errors import UserError
from llmctl.finetune.data.forms import Chat, Completion, Text
from llmctl.tokenizer import Tokenizer

Span = tuple[int, int]
_OTHER_TEMPLATE = "--chat-template gives another; --skip-bad counts such rows and goes on"


@dataclass(frozen=True)
class Draft:
    """A text and its learned characters [start, stop).

    `edges`: the tokenizer's own BOS and EOS go around it, and the end is learned. `literal`: special tokens written in
    it stay text. `turns` says who knows where a turn ends: "marked" is the template's own word, "found" spans may reach
    over the white space behind the end-of-turn token; None where there are no turns.
    """

    text: str
    learned: Sequence[Span]
    edges: bool = False
    literal: bool = False
    turns: str | None = None


class Renderer:
    """Turns values into drafts with the tokenizer's chat template; `loss_on` is assistant, completion, last or all."""

    def __init__(self, tokenizer: Tokenizer, loss_on: str = "assistant"):
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.has_used_template = False
        self._checked: set[tuple] = set()

    def drafts(self, value: Chat | Completion | Text) -> list[Draft]:
        """One draft, or one per answer where the template writes a turn in another way once others follow.

        Raises `UserError` for a template that refuses the messages, or drops or reorders a turn.
        """
        if isinstance(value, Text):
            return [Draft(value.text, [(0, len(value.text))], edges=True, literal=True)]
        if isinstance(value, Completion):
            whole = value.prompt + value.completion
            start = 0 if self.loss_on == "all" else len(value.prompt)
            return [Draft(whole, [(start, len(whole))], edges=True)]
        self.has_used_template = True
        self._check_turns(value)
        return self._chat(value)

    def _chat(self, chat: Chat) -> list[Draft]:
        whole = self._render(chat, len(chat.messages))
        if self.loss_on == "all":
            return [Draft(whole.text, [(0, len(whole.text))], turns="found")]
        if self.loss_on == "completion":
            start = self._expected_start(chat, chat.n_prompt or len(chat.messages) - 1, whole.text)
            return [Draft(whole.text, [(start, len(whole.text))], turns="found")]
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        turns = [i for i in answers if i >= chat.n_prompt and chat.messages[i].get("weight", 1)]
        turns = turns[-1:] if self.loss_on == "last" else turns
        if len(whole.generated) == len(answers):
            return [Draft(whole.text, [whole.generated[answers.index(i)] for i in turns], turns="marked")]
        spans = [self._span(chat, i, whole.text) for i in turns]
        if all(span is not None for span in spans):
            return [Draft(whole.text, spans, turns="found")]
        return [self._alone(chat, i) for i in turns]

    def _span(self, chat: Chat, turn: int, whole: str) -> Span | None:
        """Where a turn stands in the whole; None where it stands there in another form than when it was the last."""
        through = whole if turn + 1 == len(chat.messages) else self._render(chat, turn + 1).text
        if not whole.startswith(through):
            return None
        start = self._answer_start(chat, turn, whole)
        return None if start is None else (start, len(through))

    def _alone(self, chat: Chat, turn: int) -> Draft:
        """The conversation up to this answer, as a server would have rendered it then."""
        text = self._render(chat, turn + 1).text
        return Draft(text, [(self._expected_start(chat, turn, text), len(text))], turns="found")

    def _expected_start(self, chat: Chat, turn: int, text: str) -> int:
        start = self._answer_start(chat, turn, text)
        if start is None:
            raise UserError(
                f"the chat template writes the prompt in another way once turn {turn + 1} answers it",
                hint="put {% generation %} and {% endgeneration %} around the answers in the template",
            )
        return start

    def _answer_start(self, chat: Chat, turn: int, text: str) -> int | None:
        """Where in `text` the model takes over from the prompt in front of a turn; None where that is no prefix."""
        prompt = self._render(chat, turn, add_generation_prompt=True).text
        if text.startswith(prompt):
            return len(prompt)
        # the prompt may open what the finished turn does not show again, such as a block of thoughts
        bare = self._render(chat, turn).text
        return len(os.path.commonprefix([text, prompt])) if text.startswith(bare) else None

    def _render(self, chat: Chat, n_messages: int, **options):
        try:
            return self.tokenizer.render_chat(chat.messages[:n_messages], tools=chat.tools, **options)
        except UserError as error:
            raise UserError(error.message, error.hint or _OTHER_TEMPLATE) from error

    def _check_turns(self, chat: Chat) -> None:
        """Once for each sequence of roles: does every turn come out, in order? Marks stand in for the words."""
        shape = tuple((m["role"], bool(m["content"]), len(m.get("tool_calls", ()))) for m in chat.messages)
        if shape in self._checked:
            return
        try:
            marked = Chat([_marked(m, i) for i, m in enumerate(chat.messages)], chat.tools)
            text = self._render(marked, len(marked.messages)).text
        except UserError:
            # a template may look into the words; what it says of the real ones will be heard
            self._checked.add(shape)
            return
        before = 0
        for number, message in enumerate(chat.messages):
            places = [text.find(mark) for mark in _marks(message, number)]
            if -1 in places:
                raise UserError(f"the chat template leaves out turn {number + 1} ({message['role']})", _OTHER_TEMPLATE)
            # the system's words may be put wherever the model was trained to find them
            if places and message["role"] not in ("system", "developer"):
                if places[0] < before:
                    said = f"the chat template puts turn {number + 1} ({message['role']}) out of its place"
                    raise UserError(said, _OTHER_TEMPLATE)
                before = max(places)
        self._checked.add(shape)


def _marks(message: dict, number: int) -> list[str]:
    calls = [f"qz{number}call{i}zq" for i in range(len(message.get("tool_calls", ())))]
    return [f"qz{number}turnzq"] * bool(message["content"]) + calls


def _marked(message: dict, number: int) -> dict:
    """The message with a mark of its own as its text and as the name of each function that it calls."""
    marked = {**message, "content": message["content"] and f"qz{number}turnzq"}
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": f"qz{number}call{i}zq"}}
            for i, call in enumerate(message["tool_calls"])
        ]
    return marked
