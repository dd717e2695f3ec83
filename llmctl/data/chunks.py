"""Documents gathered into chunks for the encoder, with the tail of the corpus held out for validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from llmctl.data.text import Group, next_safe_cut
from llmctl.streams import TRAIN, VAL

CHUNK_BYTES = 1 << 22
# Many short documents weigh more than their text.
CHUNK_TEXTS = 1 << 15
# Long texts are cut into pieces of about this many characters, so that all threads of the encoder have work.
PIECE = 1 << 16


@dataclass
class Chunk:
    """Texts of one split and their UTF-8 `sizes`. Where `joined`, a text goes on with the one before (of the chunk before).

    With `unfinished`, the last text's document goes on in the next chunk.
    """

    texts: list[str]
    sizes: np.ndarray
    joined: np.ndarray
    unfinished: bool
    split: str


def chunked(groups: Iterable[Group], val_start: int | None = None, piece: int | None = PIECE) -> Iterator[Chunk]:
    """Chunks of about `CHUNK_BYTES`; text from byte `val_start` on validates; texts are cut into pieces where asked.

    A document across `val_start` becomes two: the cut is moved to the end of the character there.
    """
    waiting: list[Group] = []
    held = texts = 0
    split = TRAIN
    for group, group_split in held_out(groups, val_start):
        if waiting and (held >= CHUNK_BYTES or texts >= CHUNK_TEXTS or group_split != split):
            yield _chunk(waiting, split, piece)
            waiting, held, texts = [], 0, 0
        split = group_split
        waiting.append(group)
        held += sum(map(len, group.texts))
        texts += len(group.texts)
    if waiting:
        yield _chunk(waiting, split, piece)


def held_out(groups: Iterable[Group], val_start: int | None) -> Iterator[tuple[Group, str]]:
    """Each group with its split; the one across byte `val_start` of the text is cut in two."""
    groups = iter(groups)
    position = 0
    for group in groups:
        size = text_bytes(group.texts) if val_start is not None else 0
        if val_start is not None and position + size >= val_start:
            train, val = _cut(group, val_start - position)
            yield train, TRAIN
            val = val if val.texts else next(groups, val)
            yield replace(val, continues=False), VAL
            break
        position += size
        yield group, TRAIN
    for group in groups:
        yield group, VAL


def text_bytes(texts: list[str]) -> int:
    """Length of texts in UTF-8."""
    return sum(map(_size, texts))


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _cut(group: Group, n_bytes: int) -> tuple[Group, Group]:
    """The first `n_bytes` of the texts and the rest, between whole characters."""
    ends = np.cumsum([_size(text) for text in group.texts])
    number = int(np.searchsorted(ends, n_bytes))
    text = group.texts[number].encode()
    place = n_bytes - (int(ends[number]) - len(text))
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    before, after = text[:place].decode(), text[place:].decode()
    train = Group([*group.texts[:number], before], group.continues)
    return train, Group([*([after] if after else []), *group.texts[number + 1 :]], unfinished=group.unfinished)


def _chunk(groups: list[Group], split: str, piece: int | None) -> Chunk:
    texts: list[str] = []
    joined: list[bool] = []
    for group in groups:
        for number, text in enumerate(group.texts):
            parts = _pieces(text, piece)
            texts += parts
            joined += [group.continues and number == 0] + [True] * (len(parts) - 1)
    sizes = np.fromiter(map(_size, texts), np.int64, len(texts))
    return Chunk(texts, sizes, np.array(joined, bool), groups[-1].unfinished, split)


def _pieces(text: str, piece: int | None) -> list[str]:
    if piece is None or len(text) < 2 * piece:
        return [text]
    parts, start = [], 0
    while (cut := next_safe_cut(text, start + piece)) is not None:
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]
