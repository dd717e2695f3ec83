"""A chart in characters: braille dots, two wide and four high in each cell."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from llmctl.plotting.curves import Curve
from llmctl.quantities import format_count, format_duration

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row, then column
_COLORS = (36, 33, 35, 32, 34, 31)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class _Scale:
    """From values between `low` and `high` to dots 0 to `size` - 1."""

    low: float
    high: float
    size: int

    def dot(self, value: float) -> int:
        span = self.high - self.low
        return round((value - self.low) / span * (self.size - 1)) if span else self.size // 2


def draw(curves: list[Curve], x: str, y: str, width: int, height: int, color: bool) -> str:
    """The chart with its axes and legend, `width` x `height` characters.

    Without colors, the curves of a chart with several are told apart by letters.
    """
    labels = {i: _tick(value, y) for i, value in _y_ticks(curves, height)}
    margin = max(map(len, labels.values())) + 2
    columns = max(width - margin, 10)
    scale_x = _Scale(*_limits([curve.x for curve in curves]), columns * 2)
    scale_y = _Scale(*_limits([curve.y for curve in curves]), height * 4)
    cells = _cells(curves, scale_x, scale_y)
    use_letters = len(curves) > 1 and not color
    lines = [_legend(curves, color, use_letters)]
    for row in range(height):
        drawn = "".join(_glyph(cells.get((row, column)), color, use_letters) for column in range(columns))
        lines.append(f"{labels.get(row, ''):>{margin - 2}} ┤{drawn}".rstrip())
    lines.append(" " * (margin - 1) + "└" + "─" * columns)
    low, high = _tick(scale_x.low, x), _tick(scale_x.high, x)
    lines.append(" " * margin + f"{low}{x:^{max(columns - len(low) - len(high), len(x))}}{high}")
    return "\n".join(lines)


def _cells(curves: list[Curve], scale_x: _Scale, scale_y: _Scale) -> dict[tuple[int, int], tuple[int, int]]:
    """Braille bits and the number of the curve that drew last, by row and column of characters."""
    cells: dict[tuple[int, int], tuple[int, int]] = {}
    for number, curve in enumerate(curves):
        dots = [(scale_x.dot(x), scale_y.size - 1 - scale_y.dot(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        joined = itertools.chain(*itertools.starmap(_line, itertools.pairwise(dots))) if len(dots) > 1 else dots
        for column, row in joined:
            place = (row // 4, column // 2)
            bits = cells[place][0] if place in cells else 0
            cells[place] = (bits | _DOTS[row % 4][column % 2], number)
    return cells


def _line(start: tuple[int, int], end: tuple[int, int]):
    """Dots from one to another, both included."""
    n = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for i in range(n + 1):
        yield round(start[0] + (end[0] - start[0]) * i / n), round(start[1] + (end[1] - start[1]) * i / n)


def _glyph(cell: tuple[int, int] | None, color: bool, use_letters: bool) -> str:
    if cell is None:
        return " "
    bits, number = cell
    if use_letters:
        return _LETTERS[number % len(_LETTERS)]
    return _painted(chr(0x2800 + bits), number, color)


def _legend(curves: list[Curve], color: bool, use_letters: bool) -> str:
    marks = [_LETTERS[i % len(_LETTERS)] if use_letters else _painted("━", i, color) for i in range(len(curves))]
    return "   ".join(f"{mark} {curve.label} {curve.y[-1]:.4g}" for mark, curve in zip(marks, curves, strict=True))


def _painted(text: str, number: int, color: bool) -> str:
    return f"\033[{_COLORS[number % len(_COLORS)]}m{text}\033[0m" if color else text


def _limits(values: list[list[float]]) -> tuple[float, float]:
    return min(map(min, values)), max(map(max, values))


def _y_ticks(curves: list[Curve], height: int):
    low, high = _limits([curve.y for curve in curves])
    for row in range(0, height, max(height // 5, 1)):
        yield row, high - (high - low) * row / max(height - 1, 1)


def _tick(value: float, axis: str) -> str:
    if axis == "time":
        return format_duration(value)
    return format_count(value) if abs(value) >= 1000 else f"{value:.4g}"
