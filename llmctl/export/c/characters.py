"""What characters are to the tokenizers library, as tables for run.c: kinds, digits, canonical compositions."""

from __future__ import annotations

import functools
import unicodedata

from tokenizers import Regex, normalizers, pre_tokenizers


def ranges(patterns: dict[str, int]) -> list[tuple[int, int, int]]:
    """(first, last, value) of all code points that the classes of regular expressions hold, each with its value."""
    return [(first, last, value) for pattern, value in patterns.items() for first, last in _members(pattern)]


@functools.lru_cache
def _members(pattern: str) -> list[tuple[int, int]]:
    """Ranges of code points that a class of the library's regular expressions holds: its Unicode version counts."""
    splitter = pre_tokenizers.Split(Regex(f"{pattern}+"), behavior="isolated")
    return _runs(splitter.pre_tokenize_str(_ALL), lambda text: not _one_of(pattern, text[0]))


def _one_of(pattern: str, character: str) -> bool:
    return not pre_tokenizers.Split(Regex(pattern), behavior="removed").pre_tokenize_str(character)


def _runs(pieces, is_other) -> list[tuple[int, int]]:
    """(first, last) of the pieces that belong; a piece may reach across the gap of the surrogates."""
    runs = []
    for text, _ in pieces:
        if is_other(text):
            continue
        first, last = ord(text[0]), ord(text[-1])
        if first < 0xD800 <= last:
            runs += [(first, 0xD7FF), (0xE000, last)]
        else:
            runs.append((first, last))
    return runs


@functools.lru_cache
def digits(kind: int) -> list[tuple[int, int, int]]:
    """Digits, as the library takes them one by one, as ranges of one with this value."""
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(_ALL)
    return [(ord(text), ord(text), kind) for text, _ in pieces if len(text) == 1 and _is_digit(text)]


def _is_digit(character: str) -> bool:
    return len(pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(f"a{character}")) > 1


# Every letter, number and space lies below the first gap; behind it there are marks.
_ALL = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x34000), *range(0xE0100, 0xE01F0))))


@functools.lru_cache
def compositions() -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int]]]:
    """(point, first, second, whether the two compose) sorted by point, and ranges of combining classes.

    What the library's own normalizers do counts, of the characters that Unicode says may be concerned.
    """
    nfc, rows, classes = normalizers.NFC(), [], []
    for point in (*range(0x80, 0xAC00), *range(0xD7A4, 0xD800), *range(0xE000, 0x30000)):
        if order := unicodedata.combining(chr(point)):
            classes.append((point, point, order))
        parts = unicodedata.decomposition(chr(point))
        if not parts or parts.startswith("<"):
            continue
        first, *second = (int(part, 16) for part in parts.split())
        whole = nfc.normalize_str("".join(map(chr, (first, *second))))
        rows.append((point, first, second[0] if second else 0, int(bool(second) and whole == chr(point))))
    return rows, classes
