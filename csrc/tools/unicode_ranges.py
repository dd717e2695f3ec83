"""Write cpu/unicode_ranges.h: the letters and numbers as the `tokenizers` library's regular expressions see them.

    python csrc/tools/unicode_ranges.py > csrc/cpu/unicode_ranges.h

The library is asked about every code point, rather than a Unicode data file, because its engine brings its own
version of Unicode and ids must equal its ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers
from tokenizers import Regex, pre_tokenizers

SURROGATES = range(0xD800, 0xE000)


def members(pattern: str) -> list[int]:
    remover = pre_tokenizers.Split(Regex(pattern), behavior="removed")
    points = (point for point in range(0x110000) if point not in SURROGATES)
    return [point for point in points if not remover.pre_tokenize_str(chr(point))]


def ranges(points: list[int]) -> Iterator[tuple[int, int]]:
    first = last = points[0]
    for point in points[1:]:
        if point != last + 1:
            yield first, last
            first = point
        last = point
    yield first, last


def table(name: str, pattern: str) -> str:
    rows = [f"{{0x{first:x}, 0x{last:x}}}" for first, last in ranges(members(pattern))]
    lines = [", ".join(rows[i : i + 6]) for i in range(0, len(rows), 6)]
    return f"// {pattern}\ninline constexpr Range {name}[] = {{\n    " + ",\n    ".join(lines) + "};\n"


def main() -> None:
    print(f"// Made by tools/unicode_ranges.py from tokenizers {tokenizers.__version__}; do not edit.\n#pragma once\n")
    print("#include <cstdint>\n\nnamespace llmctl {\n")
    print("struct Range {\n    uint32_t first, last;\n};\n")
    for name, pattern in (("letter_ranges", r"\p{L}"), ("number_ranges", r"\p{N}"), ("space_ranges", r"\s")):
        print(table(name, pattern))
    print("}  // namespace llmctl")


main()
