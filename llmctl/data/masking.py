"""Rows for masked-language modelling: whole documents side by side, some of their tokens hidden.

What is hidden depends on the seed and the number of the row alone: a run that is resumed, or that has another number of
processes, hides the same, every epoch hides something else, and every validation the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from llmctl.data.corpus import TokenView
from llmctl.data.masking_settings import MaskingSettings
from llmctl.data.packing import IGNORE, Batch, permuted
from llmctl.errors import CalledWrongly, UserError

_TRAIN, _VAL = 0, 1
_ENCODER_TOKENIZER = "tokenize with an encoder's tokenizer, or train one: llmctl tokenize --special-tokens encoder"


class Masking:
    """Hides tokens of a sequence, in the vocabulary of one tokenizer."""

    def __init__(self, tokenizer, settings: MaskingSettings):
        if tokenizer.mask_id is None:
            raise UserError("the tokenizer has no mask token, so nothing can be masked", hint=_ENCODER_TOKENIZER)
        if settings.mask_token_share + settings.random_token_share > 1:
            raise CalledWrongly(
                f"--mask-token-share {settings.mask_token_share:g} and --random-token-share "
                f"{settings.random_token_share:g} are more than 1 together"
            )
        if not settings.mask_probability:
            raise CalledWrongly("--mask-probability 0 leaves nothing to learn")
        self.settings, self.mask_id = settings, tokenizer.mask_id
        self._is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_special[list(tokenizer.special_ids)] = True
        self._ordinary = np.flatnonzero(~self._is_special)
        self._begins_word = word_starts(tokenizer) if settings.whole_words else None

    def hide(self, ids_T: np.ndarray, maskable_T: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """(inputs, targets) int64 [T]: a target where a token is to be predicted, else IGNORE.

        Special tokens are never chosen, nor what is false in `maskable_T` (bool).
        """
        candidates = np.flatnonzero(maskable_T & ~self._is_special[ids_T])
        n_wanted = min(len(candidates), max(1, round(self.settings.mask_probability * len(candidates))))
        chosen = self._chosen(ids_T, candidates, n_wanted, rng)
        targets_T = np.full(len(ids_T), IGNORE, dtype=np.int64)
        targets_T[chosen] = ids_T[chosen]
        inputs_T = ids_T.astype(np.int64)
        draw = rng.random(len(chosen))
        random_until = self.settings.mask_token_share + self.settings.random_token_share
        inputs_T[chosen[draw < self.settings.mask_token_share]] = self.mask_id
        replaced = chosen[(draw >= self.settings.mask_token_share) & (draw < random_until)]
        inputs_T[replaced] = rng.choice(self._ordinary, len(replaced))
        return inputs_T, targets_T

    def _chosen(self, ids_T, candidates, n_wanted: int, rng: np.random.Generator) -> np.ndarray:
        if self._begins_word is None:
            return rng.permutation(candidates)[:n_wanted]
        # a word ends where the next one, or a token that may not be chosen, begins
        begins = self._begins_word[ids_T[candidates]]
        begins[1:] |= np.diff(candidates) > 1
        begins[:1] = True
        firsts = np.flatnonzero(begins)
        lengths = np.diff(firsts, append=len(candidates))
        order = rng.permutation(len(firsts))
        n_words = int(np.searchsorted(np.cumsum(lengths[order]), n_wanted)) + 1
        taken = order[:n_words] if n_wanted else order[:0]
        return np.concatenate([candidates[firsts[w] : firsts[w] + lengths[w]] for w in taken] or [candidates[:0]])


class MaskedRows:
    """Rows of one split. A document that fits into a row is never cut; padding fills the rows up.

    Row number n is the same in every process, on every world size and after every resume.
    """

    unit = "masked token"
    n_bytes = None
    """What is predicted is a sample of the text, so there is no number of bytes to divide by."""

    def __init__(
        self,
        view: TokenView,
        seq_len: int,
        tokenizer,
        *,
        masking: Masking,
        seed: int = 0,
        isolate_documents: bool = True,
    ):
        self.view, self.seq_len, self.masking, self.seed, self.isolate = view, seq_len, masking, seed, isolate_documents
        if tokenizer.pad_id is None:
            raise UserError("the tokenizer has no padding token, which fills rows up", hint=_ENCODER_TOKENIZER)
        self.pad_id = tokenizer.pad_id
        self._bounds = row_bounds(view.starts, view.n_tokens, seq_len)
        self.rows_per_epoch = len(self._bounds) - 1

    @property
    def n_tokens(self) -> int:
        return self.view.n_tokens

    def train_batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` … of the endless shuffled sequence of epochs."""
        rows = []
        for number in range(first_row, first_row + n_rows):
            epoch, index = divmod(number, self.rows_per_epoch)
            row = permuted(index, self.rows_per_epoch, self.seed, epoch)
            rows.append(self._row(row, np.random.default_rng([self.seed, _TRAIN, number])))
        return self._batch(rows)

    def validation_batches(self, n_rows: int) -> Iterator[Batch]:
        """All rows once, in order; the last batch may be smaller."""
        for at in range(0, self.rows_per_epoch, n_rows):
            numbers = range(at, min(at + n_rows, self.rows_per_epoch))
            yield self._batch([self._row(n, np.random.default_rng([self.seed, _VAL, n])) for n in numbers])

    def _row(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        start, stop = self._bounds[row : row + 2].tolist()
        ids = self.view.read(start, stop)
        learned = self.view.loss_mask(start, stop)
        inputs, targets = self.masking.hide(ids, np.ones(len(ids), dtype=bool) if learned is None else learned, rng)
        documents = np.searchsorted(self.view.starts[1:], np.arange(start, stop), side="right")
        if not self.isolate:
            documents[:] = documents[0]
        missing = self.seq_len - len(ids)
        return (
            np.pad(inputs, (0, missing), constant_values=self.pad_id),
            np.pad(targets, (0, missing), constant_values=IGNORE),
            np.pad(documents, (0, missing), constant_values=documents[-1] + 1),  # padding is seen by nothing else
        )

    def _batch(self, rows: list[tuple[np.ndarray, ...]]) -> Batch:
        inputs, targets, documents = (np.stack(part) for part in zip(*rows, strict=True))
        several = bool((documents[:, :1] != documents[:, -1:]).any())
        return Batch(inputs, targets, documents if several else None)


def row_bounds(starts: np.ndarray, n_tokens: int, length: int) -> np.ndarray:
    """Where rows of at most `length` tokens begin, and where the last one ends: int64, in tokens.

    A row ends in front of a document that would not fit into what is left of it but fits into a row of its own.
    """
    bounds = [0]
    while bounds[-1] < n_tokens:
        end = bounds[-1] + length
        number = int(np.searchsorted(starts, end, side="right")) - 1
        start = int(starts[number])
        stop = int(starts[number + 1]) if number + 1 < len(starts) else n_tokens
        fits_alone = stop - start <= length
        bounds.append(min(n_tokens, start if stop > end and fits_alone and start > bounds[-1] else end))
    return np.array(bounds, dtype=np.int64)


def word_starts(tokenizer) -> np.ndarray:
    """Of each id, whether it begins a word: bool [V]. Raises UserError for a tokenizer whose tokens do not say so."""
    model = json.loads(tokenizer.json)["model"]
    prefix = model.get("continuing_subword_prefix")
    if model.get("type") == "WordPiece" and prefix:
        continues = [number for token, number in model["vocab"].items() if token.startswith(prefix)]
        return ~np.isin(np.arange(tokenizer.vocab_size), continues)
    texts = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    if not any(text[:1] == b" " and text.strip().isalpha() for text in texts):
        raise UserError("the tokenizer does not mark where words begin", hint="leave --whole-words out")
    # a space, or another ASCII character that is no letter or digit, stands in front of a word or for itself
    return np.array([not text or text[0] < 0x80 and not chr(text[0]).isalnum() for text in texts])
