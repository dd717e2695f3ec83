"""Documents gathered into chunks for the encoder, with the tail of the corpus held out for validation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate

from llmctl.data.text import LONGEST, Group, last_cut
from llmctl.stream_header import TRAIN, VAL

CHUNK_BYTES = 1 << 22
# Many short documents weigh more than their text.
CHUNK_TEXTS = 1 << 15


@dataclass
class Chunk:
    """UTF-8 texts of one split. Where `joined`, a text goes on with the one before (of the chunk before).

    With `unfinished`, the last text's document goes on in the next chunk.
    """

    split: str
    texts: list[bytes] = field(default_factory=list)
    joined: list[bool] = field(default_factory=list)
    unfinished: bool = False
    n_bytes: int = 0

    def add(self, texts: list[bytes], continues: bool) -> None:
        self.texts += texts
        self.joined += [continues and number == 0 for number in range(len(texts))]
        self.n_bytes += text_bytes(texts)


def chunked(groups: Iterable[Group], val_start: int | None = None) -> Iterator[Chunk]:
    """Chunks of about `CHUNK_BYTES`; text from byte `val_start` on validates.

    A document across `val_start` becomes two: the cut is moved to the end of the character there.
    """
    chunk = Chunk(TRAIN)
    for group, split in held_out(groups, val_start):
        is_full = chunk.n_bytes >= CHUNK_BYTES or len(chunk.texts) >= CHUNK_TEXTS
        if chunk.texts and (is_full or split != chunk.split):
            yield chunk
            chunk = Chunk(split)
        chunk.split, chunk.unfinished = split, group.unfinished
        chunk.add(group.texts, group.continues)
    if chunk.texts:
        yield chunk


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


def text_bytes(texts: Iterable[bytes]) -> int:
    return sum(map(len, texts))


def whole_documents(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same with the parts of each document joined, as far as they are not longer than `LONGEST`."""
    held, is_part = b"", False  # a document, or the rest of one, that may go on
    for chunk in chunks:
        whole = Chunk(chunk.split)
        for text, continues in zip(chunk.texts, chunk.joined, strict=True):
            if not continues and held:
                whole.add([held], is_part)
                held, is_part = b"", False
            held += text
            if len(held) >= LONGEST:
                cut = last_cut(held)
                whole.add([held[:cut]], is_part)
                held, is_part = held[cut:], True
        if not chunk.unfinished:
            whole.add([held], is_part)
            held, is_part = b"", False
        whole.unfinished = is_part
        if whole.texts:
            yield whole


def _cut(group: Group, n_bytes: int) -> tuple[Group, Group]:
    """The first `n_bytes` of the texts and the rest, between whole characters."""
    ends = list(accumulate(map(len, group.texts)))
    number = bisect_left(ends, n_bytes)
    text = group.texts[number]
    place = n_bytes - (ends[number] - len(text))
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    before, after = text[:place], text[place:]
    train = Group([*group.texts[:number], before], group.continues)
    return train, Group([*([after] if after else []), *group.texts[number + 1 :]], unfinished=group.unfinished)
