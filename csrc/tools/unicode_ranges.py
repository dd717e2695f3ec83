"""Write cpu/unicode_ranges.h: the kinds of characters as the `tokenizers` library's regular expressions see them.

    python csrc/tools/unicode_ranges.py > csrc/cpu/unicode_ranges.h

The library is asked about every code point, rather than a Unicode data file, because its engine brings its own
version of Unicode and ids must equal its ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers
from tokenizers import Regex, pre_tokenizers

POINTS = [*range(0xD800), *range(0xE000, 0x110000)]
TABLES = {
    "letter_ranges": r"\p{L}",
    "number_ranges": r"\p{N}",
    "space_ranges": r"\s",
    "upper_ranges": r"[\p{Lu}\p{Lt}]",
    "lower_ranges": r"\p{Ll}",
    "mark_ranges": r"\p{M}",
}


def members(pattern: str) -> list[int]:
    remover = pre_tokenizers.Split(Regex(pattern), behavior="removed")
    return [point for point in POINTS if not remover.pre_tokenize_str(chr(point))]


def digits() -> list[int]:
    """What the library's `Digits` sets apart: it does not ask the engine of regular expressions."""
    splitter = pre_tokenizers.Digits(individual_digits=True)
    return [point for point in POINTS if len(splitter.pre_tokenize_str(f"a{chr(point)}")) > 1]


def ranges(points: list[int]) -> Iterator[tuple[int, int]]:
    first = last = points[0]
    for point in points[1:]:
        if point != last + 1:
            yield first, last
            first = point
        last = point
    yield first, last


def table(name: str, comment: str, points: list[int]) -> str:
    rows = [f"{{0x{first:x}, 0x{last:x}}}" for first, last in ranges(points)]
    lines = [", ".join(rows[i : i + 6]) for i in range(0, len(rows), 6)]
    return f"// {comment}\ninline constexpr Range {name}[] = {{\n    " + ",\n    ".join(lines) + "};\n"


def main() -> None:
    print(f"// Made by tools/unicode_ranges.py from tokenizers {tokenizers.__version__}; do not edit.\n#pragma once\n")
    print("#include <cstdint>\n\nnamespace llmctl {\n")
    print("struct Range {\n    uint32_t first, last;\n};\n")
    for name, pattern in TABLES.items():
        print(table(name, pattern, members(pattern)))
    print(table("digit_ranges", "what the library's pre-tokenizer Digits sets apart", digits()))
    print("}  // namespace llmctl")


main()
