"""SentencePiece's table of what text is replaced with before it is cut into pieces: a double array and the replacements.

The array is darts-clone's (https://github.com/s-yata/darts-clone).
"""

from __future__ import annotations

import struct

from llmctl.errors import UserError


def replacement(table: bytes, text: str) -> str | None:
    """What exactly `text` is replaced with, None where there is no such rule. Raises UserError for no whole table."""
    try:
        (size,) = struct.unpack_from("<I", table)
        node = _offset(_unit(table, 0))
        for byte in text.encode():
            node ^= byte
            unit = _unit(table, node)
            if unit & 0x800000FF != byte:
                return None
            node ^= _offset(unit)
        if not unit >> 8 & 1:
            return None
        start = 4 + size + (_unit(table, node) & 0x7FFFFFFF)
        return table[start : table.index(b"\0", start)].decode()
    except (struct.error, ValueError) as error:
        raise UserError("not a SentencePiece model: its table of characters is cut short") from error


def composes(table: bytes) -> bool:
    """Whether a letter and the mark behind it become one character."""
    return replacement(table, "か\u3099") == "が"


def _unit(table: bytes, place: int) -> int:
    return struct.unpack_from("<I", table, 4 + 4 * place)[0]


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)
