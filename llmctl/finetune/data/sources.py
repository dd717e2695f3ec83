"""Which files, and how often each is drawn from."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llmctl.errors import CalledWrongly


@dataclass(frozen=True)
class Source:
    """A file, or "-" for standard input; `weight` is None where all rows of all files count the same.

    Nothing is held out of what is from an earlier task.
    """

    path: str
    weight: float | None = None
    is_held_out: bool = False
    is_earlier: bool = False


def parse_sources(words: list[str], held_out: tuple[str, ...] = ()) -> list[Source]:
    """Sources from PATH or PATH:WEIGHT, and those of `held_out`. Raises `CalledWrongly` unless all or none have a weight."""
    sources = [_source(word) for word in words]
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(source.path for source in sources if source.weight is None)
        raise CalledWrongly(
            f"{bare} has no weight, {weighted[0].path} has {weighted[0].weight:g}", "weight all or none"
        )
    if [source.path for source in sources].count("-") > 1:
        raise CalledWrongly("standard input (-) can be read once only")
    return sources + [Source(path, None, is_held_out=True) for path in held_out]


def _source(word: str) -> Source:
    path, colon, number = word.rpartition(":")
    if not colon or os.path.exists(word):
        return Source(word)
    try:
        weight = float(number)
    except ValueError:
        return Source(word)
    if not 0 < weight < float("inf"):
        raise CalledWrongly(f"{word}: expected a weight above 0, got {number}")
    return Source(path, weight)
