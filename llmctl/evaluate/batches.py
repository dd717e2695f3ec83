"""Texts that run together: alike in length, and those that begin alike apart from the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

MAX_TOKENS = 16384
"""Tokens of a batch, padding counted, beyond which it holds fewer texts."""

_LEAST = 16  # tokens in common that make two texts alike
_WORTH = 512  # tokens that are not run again; fewer do not pay for a batch of their own


@dataclass(frozen=True)
class Batch:
    """`numbers` of texts, and the tokens that all of them begin with, where it pays to run these once."""

    numbers: list[int]
    shared: Sequence[int] = field(default=())


def plan(
    texts: Sequence[Sequence[int]], batch_size: int, can_share: bool, lengths: Sequence[int] | None = None
) -> Iterator[Batch]:
    """All texts, each in one batch of at most `batch_size`; longest first: if memory is short, it shows at once.

    `lengths` are those with what follows each text, where that is known. What is shared does not depend on `batch_size`.
    """
    lengths = [len(text) for text in texts] if lengths is None else lengths
    groups = _groups(texts) if can_share else []
    alone = set(range(len(texts))) - {number for numbers, _ in groups for number in numbers}
    for numbers, shared in [*groups, (list(alone), ())]:
        ordered = sorted(numbers, key=lambda number: (-len(texts[number]), -lengths[number], number))
        while ordered:
            count = affordable(max(lengths[number] for number in ordered[:batch_size]), batch_size)
            yield Batch(ordered[:count], shared)
            ordered = ordered[count:]


def affordable(length: int, batch_size: int) -> int:
    """How many texts of this length run together."""
    return max(1, min(batch_size, MAX_TOKENS // max(1, length)))


def _groups(texts: Sequence[Sequence[int]]) -> list[tuple[list[int], Sequence[int]]]:
    """Texts that begin alike: in the order of their tokens, one joins a group whose common beginning it mostly keeps."""
    order = sorted(range(len(texts)), key=lambda number: tuple(texts[number]))
    groups: list[tuple[list[int], int]] = []
    last = None
    for number in order:
        own = len(texts[number]) - 1  # the last token is run for each: its hidden state is asked for
        kept = 0 if last is None else _common(texts[last], texts[number], own)
        if kept >= _LEAST:
            members, length = groups[-1]
            if len(members) == 1 or length / 2 <= kept <= length * 2:
                groups[-1] = ([*members, number], min(kept, length))
            elif kept > length:  # the last one has more in common with this one than with those before it
                groups[-1] = (members[:-1], length)
                groups.append(([last, number], kept))
            else:
                groups.append(([number], own))
        else:
            groups.append(([number], own))
        last = number
    worth = [(members, length) for members, length in groups if length * (len(members) - 1) >= _WORTH]
    return [(members, texts[members[0]][:length]) for members, length in worth]


def _common(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    limit = min(limit, len(first))
    return next((i for i in range(limit) if first[i] != second[i]), limit)
