"""Okapi BM25 (Robertson and Zaragoza 2009) over passages: which of them share rare words with a question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)")
_STOP = frozenset(
    "a an and are as at be by do does did for from had has have how i in is it its of on or that the their this to was "
    "were what when where which who whom whose why will with would".split()
)


def words(text: str) -> list[str]:
    """Lower case, without the commonest function words and with plurals and verb endings taken off.

    Scripts that put no spaces between words (Chinese, Japanese, Thai) give each two neighbouring letters.
    """
    found = (part for word in _WORD.findall(text.casefold()) for part in _parts(word))
    return [_stem(word) for word in found if word not in _STOP]


def _parts(word: str) -> Iterator[str]:
    for number, part in enumerate(_UNSPACED.split(word)):
        if number % 2:
            yield from (part[i : i + 2] for i in range(max(1, len(part) - 1)))
        elif part:
            yield part


def _stem(word: str) -> str:
    """Step 1a of Porter's stemmer (1980) and the commonest of its other endings."""
    if len(word) <= 3 or not word.isascii():
        return word
    for ending, instead in (("sses", "ss"), ("ies", "y"), ("ing", ""), ("ed", ""), ("ly", "")):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return _undoubled(word[: -len(ending)] + instead)
    return word[:-1] if word[-1] == "s" and word[-2] != "s" else word.removesuffix("e") if len(word) > 4 else word


def _undoubled(stem: str) -> str:
    doubled = len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsz"
    return stem[:-1] if doubled else stem.removesuffix("e")


class Bm25:
    """Postings by word; `scores` gives one number per text, 0 where no word is shared."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        counts = [Counter(text) for text in texts]
        self.n = len(texts)
        lengths = np.array([len(text) for text in texts], np.float64)
        mean = lengths.mean() if self.n else 1.0
        self._norm_N = K1 * (1 - B + B * lengths / max(mean, 1e-9))
        postings: dict[str, list[tuple[int, int]]] = {}
        for place, count in enumerate(counts):
            for word, times in count.items():
                postings.setdefault(word, []).append((place, times))
        self._postings = {
            word: (np.array([p for p, _ in found]), np.array([t for _, t in found], np.float64))
            for word, found in postings.items()
        }

    def scores(self, question: Sequence[str]) -> np.ndarray:
        """float64 [N]; a word's weight is log(1 + (N - n + 0.5) / (n + 0.5)) for n texts that have it."""
        scores_N = np.zeros(self.n)
        for word in set(question):
            if word in self._postings:
                places, times = self._postings[word]
                weight = np.log1p((self.n - len(places) + 0.5) / (len(places) + 0.5))
                scores_N[places] += weight * times * (K1 + 1) / (times + self._norm_N[places])
        return scores_N
