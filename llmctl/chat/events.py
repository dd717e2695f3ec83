"""What happens while a question is answered, in order, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmctl.chat.engine import Answer
    from llmctl.chat.tools.toolbox import Call
    from llmctl.retrieval.index import Passage


@dataclass(frozen=True)
class Piece:
    """More of the answer's text; `answer` is what there is of it so far."""

    text: str
    answer: Answer


@dataclass(frozen=True)
class Remark:
    """What a person should know: turns were dropped, the context cut the answer."""

    text: str


@dataclass(frozen=True)
class Found:
    """The passages that go with the question."""

    passages: list[Passage]


@dataclass(frozen=True)
class Calls:
    """The text is complete and asks for tools: what comes next may ask a person."""

    calls: list[Call]


@dataclass(frozen=True)
class Called:
    """A tool was called, and this came of it. `was_given`: the model reads the result."""

    call: Call
    result: str
    was_given: bool


@dataclass(frozen=True)
class Done:
    """The answer is complete, or was stopped."""

    answer: Answer


Event = Piece | Remark | Found | Calls | Called | Done
