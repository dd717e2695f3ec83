"""The tool layer of a conversation: which of a model's calls are run, and who says so.

Text from elsewhere (passages of documents, attachments, results of tools) is data. A call is taken from the tokens that
the model has drawn, never from such text; one that stands in such text word for word is a quotation, and is not run. And
once such text is in the conversation, a tool that does more than compute runs only when a person agrees: an
instruction hidden in a document has nobody to agree with it (indirect prompt injection, Greshake et al. 2023).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

from llmctl.chat.events import Called
from llmctl.chat.prompt import defused, shortened
from llmctl.chat.tools import calls
from llmctl.chat.tools.toolbox import Call, Toolbox
from llmctl.tokenizer import Tokenizer

REFUSED = "refused by the user"
Approve = Callable[[Call, str | None, bool], bool]
"""Asked with a call before it is run (result None) where it reaches out, and with its result before the model gets it.

The last argument says that there is text from elsewhere in the conversation, which may have led to the call.
"""


class ToolLayer:
    """`approve` is None where there is nobody to ask. A result has `max_tokens` at most, None for no limit."""

    def __init__(self, toolbox: Toolbox, tokenizer: Tokenizer, approve: Approve | None, max_tokens: int | None = None):
        self.toolbox, self.tokenizer, self.approve, self.max_tokens = toolbox, tokenizer, approve, max_tokens
        markup = "".join(token["content"] for token in json.loads(tokenizer.json).get("added_tokens") or [])
        self.format = calls.format_of(_tool_template(tokenizer), markup)
        self._n_calls = 0

    @property
    def system_text(self) -> str | None:
        """What the system message must say of the tools, where the template does not."""
        return None if self.format.is_known else calls.described(self.toolbox.schemas())

    @property
    def schemas(self) -> list[dict] | None:
        return self.toolbox.schemas() if self.format.is_known else None

    def parse(self, raw: str) -> calls.Said:
        return self.format.parse(raw)

    def message(self, raw: str, said: calls.Said) -> dict:
        """The assistant's message; a template that knows no tools would leave out its calls, so that they stay text."""
        if not self.format.is_known:
            return {"role": "assistant", "content": raw.strip()}
        message = calls.as_message(said.text, said.calls, self._n_calls)
        self._n_calls += len(said.calls)
        return message

    def results(self, message: dict, asked: Sequence[Call], messages: Sequence[dict]) -> Iterator[tuple[Called, dict]]:
        """Each call with what came of it, and the message that tells the model; `messages` are what it has read so far."""
        for number, call in enumerate(asked):
            happened = self._run(call, texts_from_elsewhere(messages))
            content = defused(happened.result if happened.was_given else REFUSED, self.tokenizer)
            if self.format.is_known:
                call_id = message["tool_calls"][number]["id"]
                told = {"role": "tool", "name": call.name, "tool_call_id": call_id, "content": content}
            else:
                told = {"role": "user", "content": calls.as_text(call, content), "is_result": True}
            yield happened, {**told, "from_elsewhere": self._brings_text(happened)}

    def _brings_text(self, happened: Called) -> bool:
        tool = self.toolbox.tools.get(happened.call.name)
        return happened.was_given and tool is not None and tool.reaches_out

    def _run(self, call: Call, from_elsewhere: Sequence[str]) -> Called:
        tool = self.toolbox.tools.get(call.name)
        if any(_is_quoted(call, text) for text in from_elsewhere):
            return Called(call, "error: this call stands in a document; it is a quotation, not run", True)
        reaches_out = tool is not None and tool.reaches_out and self.toolbox.problem(call) is None
        if reaches_out and self.approve is None and from_elsewhere:
            return Called(call, "error: not run: there is text from elsewhere here, and nobody to agree", True)
        is_tainted = bool(from_elsewhere)
        if reaches_out and self.approve is not None and not self.approve(call, None, is_tainted):
            return Called(call, REFUSED, False)
        result = shortened(self.toolbox.run(call), self.tokenizer, self.max_tokens)
        return Called(call, result, self.approve is None or self.approve(call, result, is_tainted))


def texts_from_elsewhere(messages: Sequence[dict]) -> list[str]:
    """What the user did not write, nor the model: it is marked in the messages themselves, which a session keeps.

    Results of tools are such text unless they say otherwise. The question behind its sources is the user's own.
    """
    marked = [message for message in messages if message.get("from_elsewhere", message["role"] == "tool")]
    return [message["content"].removesuffix(message.get("question", "")) for message in marked]


def _tool_template(tokenizer: Tokenizer) -> str:
    from llmctl import chat_template

    named = chat_template.by_name(tokenizer.config.get("chat_template"))
    return named.get("tool_use") or named.get("default") or ""


def _is_quoted(call: Call, text: str) -> bool:
    """Whether a text holds the call: its name, and every argument word for word, whatever stands between them."""
    plain = _squeezed(text)
    values = [value if isinstance(value, str) else json.dumps(value) for value in call.arguments.values()]
    if not call.name or _squeezed(call.name) not in plain:
        return False
    return all(_squeezed(value) in plain for value in values)


def _squeezed(text: str) -> str:
    """Without spaces, quotes, backslashes and case, in which a quotation may differ."""
    return "".join(letter for letter in text.casefold() if letter.isalnum() or letter in "+-*/%._=")
