"""From messages to the ids that a model reads: its own chat template, and the tokens of earlier answers as they were drawn."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from llmctl.errors import UserError
from llmctl.finetune.data.template import choose_template
from llmctl.retrieval.quoting import question_with
from llmctl.tokenizer import Tokenizer

_REMEMBERED = 64
_LEAST_SHARE = 32  # tokens of a quoted passage
_PLAIN_STOPS = ("\n\nUser:", "\n\nSystem:", "\n\nTool:", "\n\nAssistant:")


class ChatPrompt:
    """A tokenizer with a template; `is_plain` where the model has none and gets a plain transcript.

    An answer that is written again and split anew into tokens may give other tokens than the model drew, which the cache
    does not hold. So the ids of answers are remembered, and stand where their text stands.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None = None):
        self.is_plain = chat_template is None and not tokenizer.chat_template
        self.tokenizer = choose_template(tokenizer, chat_template)
        self._known: list[tuple[str, list[int]]] = []

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer because a base model goes on to write the next turn itself."""
        return _PLAIN_STOPS if self.is_plain else ()

    @property
    def template(self) -> str:
        return self.tokenizer.chat_template or ""

    def text(self, messages: Sequence[dict], tools: Sequence[dict] | None = None) -> str:
        """What is in front of the next answer. Raises `UserError` where the template refuses the messages."""
        if not messages:
            raise UserError("a conversation begins with a message")
        try:
            return self.tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools).text
        except UserError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(
                f"the model's chat template refuses this conversation ({roles}): {error.message}",
                hint="a conversation of another model may have turns that this one does not know; /undo or /reset",
            ) from error

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered text."""
        fitting = [known for known in self._known if self._continues(text, known[0])]
        if not fitting:
            return self._encoded(text)
        front, ids = max(fitting, key=lambda known: len(known[0]))
        return ids + self._encoded(text[len(front) :])

    def remember(self, text: str, prompt_ids: Sequence[int], answer: str, answer_ids: Sequence[int]) -> None:
        """An answer to a rendered text, without the token that ended it."""
        self._known = [*self._known[1 - _REMEMBERED :], (text + answer, [*prompt_ids, *answer_ids])]

    def _continues(self, text: str, front: str) -> bool:
        """Only behind a special token, which stands by itself, does the rest split into tokens as within the whole."""
        return text.startswith(front) and text.startswith(_markup(self.tokenizer.json), len(front))

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def defused(text: str, tokenizer: Tokenizer) -> str:
    """Text from elsewhere, in which no token of the model's own markup is left: a space goes into each written there."""
    for token in _markup(tokenizer.json):
        if len(token) > 1 and token.strip():
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def shortened(text: str, tokenizer: Tokenizer, n_tokens: int | None, n_own: int | None = None) -> str:
    """The beginning of a text, of about so many tokens at most, and how much is left out; None is no limit.

    `n_own` are its tokens where they are not those of the bare text.
    """
    if n_tokens is None:
        return text
    n_own = len(tokenizer.encode(text, add_special_tokens=False)) if n_own is None else n_own
    if n_own <= n_tokens:
        return text
    kept = len(text) * n_tokens // n_own
    return f"{text[:kept]}\n[cut: {len(text) - kept:,} characters more]"


def fitting(sources: Sequence[tuple[str, str]], tokenizer: Tokenizer, n_tokens: int) -> list[tuple[str, str]]:
    """As many of the sources (name, text), from the first on, as so many tokens have room for when they are quoted: each
    is shortened to its share, but to no less than a few words."""

    def count(*quoted: tuple[str, str]) -> int:
        return len(tokenizer.encode(question_with("", quoted), add_special_tokens=False))

    for n in range(len(sources), 0, -1):
        share = (n_tokens - count(*((name, "") for name, _ in sources[:n]))) // n
        if share >= _LEAST_SHARE:
            # What quoting puts in front of each line is read too.
            own = [count(source) - count((source[0], "")) for source in sources[:n]]
            return [(name, shortened(text, tokenizer, share, size)) for (name, text), size in zip(sources, own)]
    return []


@functools.lru_cache(maxsize=8)
def _markup(tokenizer_json: str) -> tuple[str, ...]:
    """Texts of the tokens that were added to the vocabulary, the longest first: a tokenizer finds them before all others."""
    added = json.loads(tokenizer_json).get("added_tokens") or []
    return tuple(sorted((token["content"] for token in added), key=len, reverse=True))
