"""From bytes to documents of plain text, all in UTF-8, in memory that does not depend on their length."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmctl.errors import UserError
from llmctl.stream_source import MARKER, SequentialSource

BLOCK = 1 << 18
# A document longer than this is cut even where nothing but a character boundary offers itself.
LONGEST = 1 << 24
ERRORS_HINT = "--errors replace puts U+FFFD in its place, --errors ignore leaves it out"

SEPARATORS = {
    "file": None,
    "line": re.compile(rb"[\r\n]+"),
    "blank-line": re.compile(rb"\r?\n(?:[ \t]*\r?\n)+"),
}
_SEARCHED = 1 << 12


def _safe_places() -> re.Pattern[bytes]:
    """After a lone newline, or before a lone space, between words.

    There the pre-tokenizers of all byte-level BPEs break too, so that the ids of the two parts are those of the whole.
    """
    wide = [
        rb"\xc2[\x85\xa0]",
        rb"\xe1\x9a\x80",
        rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]",
        rb"\xe2\x81\x9f",
        rb"\xe3\x80\x80",
    ]
    black = rb"[^\t-\r\x1c-\x20]"  # of ASCII; white space beyond it is `wide`
    word = rb"(?!%s)%s" % (b"|".join(wide), black)
    after_newline = rb"(?<=%s\n)(?=%s)" % (black, word) + b"".join(rb"(?<!%s\n)" % space for space in wide)
    before_space = rb"(?<=%s)(?= %s)" % (black, word) + b"".join(rb"(?<!%s)" % space for space in wide)
    return re.compile(after_newline + b"|" + before_space)


_SAFE = _safe_places()


@dataclass
class Group:
    """Documents in order. With `continues` the first goes on with the last of the group before, which is `unfinished`."""

    texts: list[bytes]
    continues: bool = False
    unfinished: bool = False


def valid_utf8(source: SequentialSource, name: str, errors: str) -> Iterator[bytes]:
    """The text in blocks of whole characters, without a byte order mark; `errors` as in `bytes.decode`.

    Raises `UserError` naming the offset of the first byte that is not UTF-8 under "strict".
    """
    held, offset = b"", 0
    while True:
        block = source.read(BLOCK)
        data = held + block if held else block
        if offset == 0:
            data = data.removeprefix(codecs.BOM_UTF8)
            offset = len(held) + len(block) - len(data)
        text, used = data, len(data)
        if not data.isascii():
            try:
                characters, used = codecs.utf_8_decode(data, errors, not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(name, data, offset, error) from error
            text = data[:used] if errors == "strict" else characters.encode()
        held, offset = data[used:], offset + used
        if text:
            yield text
        if not block:
            return


def split_text(blocks: Iterator[bytes], separator: re.Pattern[bytes] | None) -> Iterator[Group]:
    """Documents between separators, or one document; blank ones are dropped.

    A document longer than a block comes in parts, cut in safe places or, where none is found for long, anywhere.
    """
    tail, continues = b"", False
    for block in blocks:
        tail = tail + block if tail else block
        whole: list[bytes] = []
        if separator is not None:
            # Trailing white space may be half of a separator.
            body = tail.rstrip()
            *whole, last = separator.split(body)
            tail = last + tail[len(body) :]
        if whole:
            yield Group(_trimmed(whole, continues), continues)
            continues = False
        cut = last_safe_cut(tail) if len(tail) >= BLOCK else None
        if len(tail) >= LONGEST:
            cut = last_cut(tail)
        if cut is not None:
            yield Group([tail[:cut]], continues, unfinished=True)
            tail, continues = tail[cut:], True
    last = [tail] if separator is None else _trimmed(separator.split(tail), continues)
    if continues or any(last):
        yield Group(last, continues)


def next_safe_cut(text: bytes, position: int) -> int | None:
    """The first place from `position` on where cutting leaves the tokens as they are; None where none is near."""
    match = _SAFE.search(text, position, position + _SEARCHED)
    return match.start() if match else None


def last_safe_cut(text: bytes) -> int | None:
    """The last such place; None where none is near the end."""
    first = max(len(text) - _SEARCHED, 0)
    space, newline = text.rfind(b" ", first), text.rfind(b"\n", first)
    while (place := max(space, newline + 1)) > 0:
        if _SAFE.match(text, place):
            return place
        if place == newline + 1:
            newline = text.rfind(b"\n", first, newline)
        if place == space:
            space = text.rfind(b" ", first, space)
    return None


def last_cut(text: bytes) -> int:
    """The last place where a text that is too long may be cut: a safe one, or the end without its white space."""
    return last_safe_cut(text) or len(text.rstrip()) or len(text)


def _trimmed(texts: list[bytes], continues: bool) -> list[bytes]:
    """Without newlines at the ends and blank texts, except that a continued document stays and goes on as it is."""
    kept = [texts[0].rstrip(b"\r\n")] if continues else []
    stripped = (text.strip(b"\r\n") for text in texts[len(kept) :])
    return kept + [text for text in stripped if not _is_blank(text)]


def _is_blank(text: bytes) -> bool:
    # Nearly every text begins with a letter, and need not be decoded.
    return not b"!" <= text[:1] <= b"~" and not text.decode().strip()


def _not_utf8(name: str, data: bytes, offset: int, error: UnicodeDecodeError) -> UserError:
    place = offset + error.start
    hint = ERRORS_HINT
    if place == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        hint = f"it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name}"
    if place == 0 and data.startswith(MARKER):
        hint = "it looks like a token stream, which needs no tokenizing"
    return UserError(f"{name}: the byte 0x{data[error.start]:02x} at offset {place} is not UTF-8", hint=hint)
