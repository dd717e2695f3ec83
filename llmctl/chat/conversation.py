"""Messages and what one can do to them: undo, edit, branch. Nothing here knows a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from llmctl.errors import UserError, did_you_mean

MAIN = "main"


@dataclass
class Conversation:
    """`messages` are those of the current branch; a system message, if any, is the first. Others wait in `others`."""

    messages: list[dict] = field(default_factory=list)
    branch: str = MAIN
    others: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def system(self) -> str | None:
        return self.messages[0]["content"] if self.messages[:1] and self.messages[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        rest = self.messages[self.system is not None :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """All turns go; the system message stays."""
        self.messages = self.messages[: self.system is not None]

    def add(self, role: str, content: str, **more: object) -> None:
        self.messages.append({"role": role, "content": content, **more})

    def last(self, role: str) -> int:
        """The place of the last message of a role; a user's that only holds a tool's result is none. Raises `UserError` where there is none."""
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at]["role"] == role and (role != "user" or _asks(self.messages[at])):
                return at
        raise UserError(f"there is no message of the {role} yet")

    def undo(self) -> list[dict]:
        """Take away the last question and all that followed it; gives what went."""
        at = self.last("user")
        self.messages, gone = self.messages[:at], self.messages[at:]
        return gone

    def drop_answer(self) -> None:
        """Take away what followed the last question, so that it can be answered again."""
        self.messages = self.messages[: self.last("user") + 1]

    def replace_question(self, text: str) -> None:
        """The last question in other words, with the sources that it has; what followed it goes."""
        at = self.last("user")
        message = self.messages[at]
        if "question" in message:
            sources = message["content"].removesuffix(message["question"])
            message = {**message, "content": sources + text, "question": text}
        else:
            message = {**message, "content": text}
        self.messages = [*self.messages[:at], message]

    def replace_answer(self, text: str) -> None:
        """The last answer in other words, without calls of tools."""
        at = self.last("assistant")
        self.messages = [*self.messages[:at], {"role": "assistant", "content": text}]

    def prompt_of_last_answer(self) -> list[dict]:
        return self.messages[: self.last("assistant")]

    def switch(self, name: str) -> bool:
        """Go to a branch; a new name begins one with all that was said so far. Gives whether it is new."""
        if name == self.branch:
            return False
        self.others[self.branch] = copy.deepcopy(self.messages)
        is_new = name not in self.others
        self.messages = copy.deepcopy(self.messages) if is_new else self.others.pop(name)
        self.branch = name
        return is_new

    def names(self) -> list[str]:
        return [self.branch, *self.others]

    def drop_oldest(self) -> int:
        """Take away the oldest question with its answer, but never the last one; gives how many messages went."""
        begin = int(self.system is not None)
        questions = [at for at in range(begin, len(self.messages)) if _asks(self.messages[at])]
        if len(questions) < 2:
            return 0
        del self.messages[begin : questions[1]]
        return questions[1] - begin


def _asks(message: dict) -> bool:
    return message["role"] == "user" and not message.get("is_result")


def named_branch(conversation: Conversation, words: str) -> str:
    """A branch's name as typed. Raises `UserError` for one that is no single word."""
    if len(words.split()) != 1:
        known = ", ".join(conversation.names())
        raise UserError(
            f"/branch takes one name, got {words!r}; there are {known}", did_you_mean(words, known.split(", "))
        )
    return words
