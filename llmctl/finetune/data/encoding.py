"""From drafts to token ids, and from learned characters to learned tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from llmctl.finetune.data.rendering import Draft, Span
from llmctl.tokenizer import Tokenizer


class Tokens(NamedTuple):
    """`ids` int64 [n]; `learned` bool [n]: the targets of the loss. `is_torn`: a learned token begins in the prompt."""

    ids: np.ndarray
    learned: np.ndarray
    is_torn: bool = False


class DraftEncoder:
    """Ids of drafts as `Tokenizer.encode` has them, with the place of each token in the text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = np.zeros(tokenizer.vocab_size, bool)
        self._special[[*tokenizer.special_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]] = True
        # the post-processor would add BOS and EOS, and move the tokens' places past their spaces
        without_edges = json.dumps({**json.loads(tokenizer.json), "post_processor": None})
        self._parsing, self._literal = (_plain_encoder(without_edges, literal) for literal in (False, True))

    def encode(self, drafts: Sequence[Draft]) -> list[Tokens]:
        """One sequence per draft; several threads share the work."""
        found = {}
        for literal, encoder in ((False, self._parsing), (True, self._literal)):
            numbers = [i for i, draft in enumerate(drafts) if draft.literal == literal]
            encodings = encoder.encode_batch([drafts[i].text for i in numbers], add_special_tokens=False)
            found |= {i: self._sequence(drafts[i], encoding) for i, encoding in zip(numbers, encodings)}
        return [found[i] for i in range(len(drafts))]

    def _sequence(self, draft: Draft, encoding: tokenizers.Encoding) -> Tokens:
        ids = np.array(encoding.ids, np.int64)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        learned = np.zeros(len(ids), bool)
        is_torn = False
        for span in draft.learned:
            first, stop = self._tokens(draft, span, ids, places)
            learned[first:stop] = True
            is_torn |= first < stop and int(places[first, 0]) < span[0]
        if draft.edges:
            front, back = self._missing_edges(ids.tolist(), bool(draft.learned))
            ids = np.concatenate([front, ids, back])
            learned = np.concatenate([np.zeros(len(front), bool), learned, np.full(len(back), bool(draft.learned))])
        elif self._is_open(draft, ids, learned):
            ids, learned = np.append(ids, self._tokenizer.eos_id), np.append(learned, True)
        learned[:1] = False  # nothing stands in front of it to predict it from
        return Tokens(ids, learned, is_torn)

    def _tokens(self, draft: Draft, span: Span, ids: np.ndarray, places: np.ndarray) -> tuple[int, int]:
        """The tokens [first, stop) that hold characters of the span, and the one that ends a turn."""
        first = int(np.searchsorted(places[:, 1], span[0], side="right"))
        stop = max(first, int(np.searchsorted(places[:, 0], span[1], side="left")))
        special = np.flatnonzero(self._special[ids[first:stop]])
        rest = draft.text[places[first + special[-1], 1] : span[1]] if len(special) else draft.text[span[0] : span[1]]
        ends = len(special) > 0 and not rest.strip()
        if draft.turns == "found" and ends:
            return first, first + int(special[-1]) + 1
        if draft.turns == "marked" and not ends and first < stop < len(ids):
            # the template's mark may stop short of the end token, which must be learned or the model never stops
            return first, stop + int(self._special[ids[stop]] and places[stop, 0] == span[1])
        return first, stop

    def _missing_edges(self, ids: list[int], is_learned: bool) -> tuple[np.ndarray, np.ndarray]:
        """The tokenizer's own first and last tokens, as far as the text does not bring them itself.

        The end of a text that is only read is no EOS unless the tokenizer always puts one there.
        """
        front, back = self._tokenizer.document_edges if is_learned else self._tokenizer.text_edges
        front = [] if ids[: len(front)] == front else front
        back = [] if back and ids[-len(back) :] == back else back
        return np.array(front, np.int64), np.array(back, np.int64)

    def _is_open(self, draft: Draft, ids: np.ndarray, learned: np.ndarray) -> bool:
        """Whether the last answer ends the text, but nothing tells the model to stop there."""
        reaches = len(ids) > 0 and bool(learned[-1]) and not self._special[ids[-1]]
        return draft.turns is not None and reaches and self._tokenizer.eos_id is not None


def _plain_encoder(json_text: str, literal: bool) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer.from_str(json_text)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = literal
    return encoder
