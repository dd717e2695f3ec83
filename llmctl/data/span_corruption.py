"""Two ways to spoil a text for an encoder-decoder to restore; what is taken out is a function of the generator alone.

A text here is what stands between the tokens around a document. Both give (source, target), int64 arrays without those.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from llmctl.data.corruption_settings import CorruptionSettings
from llmctl.errors import CalledWrongly, UserError

SPAN_DENSITY, INFILLING_DENSITY = 0.15, 0.3


class Corruption(Protocol):
    least: int
    """Tokens that a text needs for something to be taken out and something to stay."""

    def pair(self, ids_T: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What the encoder reads, no longer than the text, and what the decoder is to write."""


def build(settings: CorruptionSettings, tokenizer, longest: int) -> Corruption:
    """The corruption that was asked for, or that the tokenizer has the tokens for, of texts of up to `longest` tokens.

    Raises UserError where the tokenizer lacks them.
    """
    sentinels = sentinel_ids(tokenizer)
    kind = settings.corruption
    if kind == "auto":
        kind = "spans" if sentinels else "infilling"
    if kind == "infilling":
        return TextInfilling(settings, tokenizer)
    if settings.permute_sentences:
        raise CalledWrongly("--permute-sentences has no part in spans", hint="it belongs to --corruption infilling")
    corruption = SpanCorruption(settings, np.array(sentinels, dtype=np.int64))
    needed = corruption.n_spans(longest)
    if needed > len(sentinels):
        raise UserError(
            f"texts of {longest} tokens need {needed} sentinel tokens (<extra_id_0>, ...); the tokenizer has "
            f"{len(sentinels)}",
            hint="train one that has them: llmctl tokenize --special-tokens sentinels",
        )
    return corruption


def sentinel_ids(tokenizer) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... as far as the tokenizer has them."""
    found: list[int] = []
    while True:
        ids = tokenizer.encode(f"<extra_id_{len(found)}>", add_special_tokens=False)
        if len(ids) != 1 or ids[0] not in tokenizer.special_ids:
            return found
        found += ids


class SpanCorruption:
    """T5's (arXiv:1910.10683, 3.1.4): each span becomes a sentinel; the target is each sentinel and what it stands for.

    A text of one length always gives sources and targets of one length: it begins with tokens that stay and ends with a
    span, and the sizes of both kinds are a random way to share their sums.
    """

    least = 2

    def __init__(self, settings: CorruptionSettings, sentinels: np.ndarray):
        self.density = settings.noise_density or SPAN_DENSITY
        self.mean_length, self.sentinels = settings.mean_span_length, sentinels

    def n_noise(self, length: int) -> int:
        return min(max(1, round(length * self.density)), length - 1)

    def n_spans(self, length: int) -> int:
        n_noise = self.n_noise(length)
        return min(max(1, round(n_noise / self.mean_length)), n_noise, length - n_noise)

    def pair(self, ids_T: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n_noise, n_spans = self.n_noise(len(ids_T)), self.n_spans(len(ids_T))
        kept_N = random_shares(len(ids_T) - n_noise, n_spans, rng)
        noise_N = random_shares(n_noise, n_spans, rng)
        cuts = np.cumsum(np.stack([kept_N, noise_N], axis=1).ravel())[:-1]
        pieces = np.split(ids_T, cuts)
        sentinels = [self.sentinels[i : i + 1] for i in range(n_spans)]
        source = [part for kept, sentinel in zip(pieces[::2], sentinels) for part in (kept, sentinel)]
        target = [part for sentinel, noise in zip(sentinels, pieces[1::2]) for part in (sentinel, noise)]
        return np.concatenate(source), np.concatenate(target)


class TextInfilling:
    """BART's (arXiv:1910.13461, 2.2): spans whose lengths are drawn from a Poisson distribution become one mask each, one
    of length 0 is a mask more; the target is the text."""

    least = 1

    def __init__(self, settings: CorruptionSettings, tokenizer):
        if tokenizer.mask_id is None:
            raise UserError(
                "the tokenizer has neither sentinels (<extra_id_0>, ...) nor a mask token to put in the place of text",
                hint="train one that has: llmctl tokenize --special-tokens sentinels (T5) or encoder (BART)",
            )
        self.density = settings.noise_density or INFILLING_DENSITY
        self.mean_length, self.mask_id = settings.mean_span_length, tokenizer.mask_id
        self._ends_sentence = sentence_ends(tokenizer) if settings.permute_sentences else None

    def pair(self, ids_T: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        source_T = ids_T if self._ends_sentence is None else self._permuted(ids_T, rng)
        lengths, n_empty = self._lengths(len(ids_T), rng)
        n_kept = len(ids_T) - int(lengths.sum())
        # Between two spans at least one token stays, or they would be one; in front and behind there need be none.
        inner = len(lengths) - 1
        gaps = random_shares(n_kept - inner + len(lengths) + 1, len(lengths) + 1, rng) - 1
        gaps[1:-1] += 1
        cuts = np.cumsum(np.stack([gaps[:-1], lengths], axis=1).ravel())
        kept = np.split(source_T, cuts)[::2]
        mask = np.array([self.mask_id], dtype=np.int64)
        parts = [part for piece in kept for part in (piece, mask)][:-1]
        source = np.concatenate(parts)
        at = np.sort(rng.integers(0, len(source) + 1, n_empty))
        return np.insert(source, at, self.mask_id), ids_T.astype(np.int64)

    def _lengths(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Lengths of the spans, at least one, and how many of length 0 were drawn among them."""
        n_noise = max(1, math.ceil(length * self.density))
        drawn, n_empty = [], 0
        while sum(drawn) < n_noise:
            value = int(rng.poisson(self.mean_length))
            n_empty += value == 0
            drawn += [min(value, n_noise - sum(drawn))] if value else []
        # As many spans as tokens between them allow; masks for nothing must not make the source longer than the text.
        while len(drawn) - 1 > length - n_noise:
            drawn[-2:] = [drawn[-2] + drawn[-1]]
        return np.array(drawn), min(n_empty, n_noise - len(drawn))

    def _permuted(self, ids_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        ends = np.flatnonzero(self._ends_sentence[ids_T[:-1]]) + 1
        sentences = np.split(ids_T, ends)
        return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def random_shares(total: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """`total` cut into `n` positive whole numbers, each way with the same probability; int64 [n]."""
    cuts = np.sort(rng.choice(total - 1, n - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def sentence_ends(tokenizer) -> np.ndarray:
    """Of each id, whether its text ends with a full stop, question or exclamation mark: bool [V]."""
    texts = (tokenizer.token_bytes(i).rstrip() for i in range(tokenizer.vocab_size))
    return np.array([text.endswith((b".", b"?", b"!")) for text in texts])
