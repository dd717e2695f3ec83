"""Prompts and continuations as token ids, split where lm-evaluation-harness splits them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llmctl.errors import UserError
from llmctl.evaluate.likelihood import Fork
from llmctl.generation.complete import refuse_what_is_no_text
from llmctl.tokenizer import Tokenizer


class PairEncoder:
    """`has_source` is True for an encoder-decoder, whose context and continuation are texts of their own."""

    def __init__(self, tokenizer: Tokenizer, has_source: bool = False):
        self.tokenizer, self._has_source = tokenizer, has_source
        self._start_text = "" if self.prefix_id is None else tokenizer.decode([self.prefix_id], False)
        self._back = [] if has_source else tokenizer.text_edges[1]
        # The choices of a question share its context.
        self.text = functools.lru_cache(maxsize=256)(self._text)

    @property
    def prefix_id(self) -> int | None:
        """The token that stands in front of a text without a context: BOS, or else EOS."""
        tokenizer = self.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt; an empty one is the token that texts begin with."""
        return self.text(text) or self._behind_prefix(())[0]

    def fork(self, context: str, continuations: Sequence[str], name: str) -> list[Fork]:
        """One fork, or several where the split between context and continuation falls in different places.

        White space at the end of a context belongs to the continuation, as tokenizers have it in front of words. Raises
        UserError for a continuation that has no tokens.
        """
        forks: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
        for text in continuations:
            context_ids, ids = self._pair(context, text)
            if not ids:
                raise UserError(f"{name}: the continuation {text!r} adds no token to its context")
            if forks and forks[-1][0] == context_ids:
                forks[-1][1].append(ids)
            else:
                forks.append((context_ids, [ids]))
        return [Fork(*each) for each in forks]

    def _pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if self._has_source:
            return self.text(bare), self._plain(continuation)
        if not bare:
            return self._behind_prefix(self._plain(continuation))
        context_ids = self.text(bare)
        return context_ids, self._text(bare + continuation)[len(context_ids) :]

    def behind_prefix(self, text: str) -> tuple[int, ...]:
        """A whole text as ids, with the token in front that its first one is predicted from."""
        before, ids = self._behind_prefix(self._plain(text))
        return before + ids

    def _behind_prefix(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.prefix_id is None:
            raise UserError("the tokenizer has neither a BOS nor an EOS token for a text to begin with")
        return ((self.prefix_id,), ids) if ids[:1] != (self.prefix_id,) else (ids[:1], ids[1:])

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _text(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt by the tokenizer's own rule, but no second BOS and nothing that would end it."""
        refuse_what_is_no_text(text, "a prompt")
        adds = not (self._start_text and text.startswith(self._start_text))
        ids = self.tokenizer.encode(text, add_special_tokens=adds)
        n_back = len(self._back)
        return tuple(ids[: len(ids) - n_back] if adds and n_back and ids[-n_back:] == self._back else ids)
