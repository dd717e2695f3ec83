"""From bytes to documents of plain text, in memory that does not depend on their length."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmctl.errors import UserError
from llmctl.stream_source import MARKER, SequentialSource

BLOCK = 1 << 18
# A document longer than this is handed on in parts even where nothing but a character boundary offers itself.
LONGEST = 1 << 24
ERRORS_HINT = "--errors replace puts U+FFFD in its place, --errors ignore leaves it out"

SEPARATORS = {
    "file": None,
    "line": re.compile(r"[\r\n]+"),
    "blank-line": re.compile(r"\r?\n(?:[ \t]*\r?\n)+"),
}
# After a lone newline, or before a lone space, between words: there the pre-tokenizers of all byte-level BPEs break
# too, so that the ids of the two parts are those of the whole.
_SAFE = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
_SEARCHED = 1 << 12


@dataclass
class Group:
    """Documents in order. With `continues` the first goes on with the last of the group before, which is `unfinished`."""

    texts: list[str]
    continues: bool = False
    unfinished: bool = False


def decoded(source: SequentialSource, name: str, errors: str) -> Iterator[str]:
    """UTF-8 text in blocks, without a byte order mark; `errors` as in `bytes.decode`.

    Raises `UserError` naming the offset of the first byte that is not UTF-8 under "strict".
    """
    held, offset = b"", 0
    while True:
        block = source.read(BLOCK)
        data = held + block
        if offset == 0:
            data = data.removeprefix(codecs.BOM_UTF8)
            offset = len(held) + len(block) - len(data)
        try:
            text, used = codecs.utf_8_decode(data, errors, not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, data, offset, error) from error
        held, offset = data[used:], offset + used
        if text:
            yield text
        if not block:
            return


def split_text(blocks: Iterator[str], separator: re.Pattern | None, longest: int = LONGEST) -> Iterator[Group]:
    """Documents between separators, or one document; blank ones are dropped.

    A document longer than `longest` characters comes in parts.
    """
    tail, continues = "", False
    for block in blocks:
        tail += block
        whole: list[str] = []
        if separator is not None:
            # Trailing white space may be half of a separator.
            body = tail.rstrip()
            *whole, last = separator.split(body)
            tail = last + tail[len(body) :]
        if whole:
            yield Group(_trimmed(whole, continues), continues)
            continues = False
        if len(tail) >= longest:
            cut = last_safe_cut(tail)
            yield Group([tail[:cut]], continues, unfinished=True)
            tail, continues = tail[cut:], True
    last = [tail] if separator is None else _trimmed(separator.split(tail), continues)
    if continues or any(last):
        yield Group(last, continues)


def next_safe_cut(text: str, position: int) -> int | None:
    """The first place from `position` on where cutting leaves the tokens as they are; None where none is near."""
    match = _SAFE.search(text, position, position + _SEARCHED)
    return match.start() if match else None


def last_safe_cut(text: str) -> int:
    """The last such place, or the end of the text where there is none."""
    stop = len(text)
    while stop > 0:
        start = max(stop - _SEARCHED, 0)
        # Two characters more, for the pattern looks ahead.
        places = [match.start() for match in _SAFE.finditer(text, start, stop + 2)]
        if places:
            return places[-1]
        stop = start
    return len(text)


def _trimmed(texts: list[str], continues: bool) -> list[str]:
    """Without newlines at the ends and blank texts, except that the end of a continued document stays."""
    stripped = [text.strip("\r\n") for text in texts]
    return [text for i, text in enumerate(stripped) if (i == 0 and continues) or (text and not text.isspace())]


def _not_utf8(name: str, data: bytes, offset: int, error: UnicodeDecodeError) -> UserError:
    place = offset + error.start
    hint = ERRORS_HINT
    if place == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        hint = f"it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name}"
    if place == 0 and data.startswith(MARKER):
        hint = "it looks like a token stream, which needs no tokenizing"
    return UserError(f"{name}: the byte 0x{data[error.start]:02x} at offset {place} is not UTF-8", hint=hint)
