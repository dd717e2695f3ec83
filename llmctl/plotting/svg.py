"""Bars and lines with error bars as SVG, which pages and Markdown show without any library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 320, 60, 34, 52


@dataclass(frozen=True)
class Series:
    """`y[i]` at x[i] with a standard error, None where there is none."""

    label: str
    x: Sequence[float | str]
    y: Sequence[float]
    error: Sequence[float | None]


def bars(title: str, series: Sequence[Series], y_label: str) -> str:
    """Groups of bars over the words of the first series' x, one bar of each series; a series may lack some."""
    words = list(dict.fromkeys(word for each in series for word in each.x))
    axis = _Axis(series, from_zero=True)
    step = (_WIDTH - _LEFT - 10) / len(words)
    width = step * 0.8 / len(series)
    parts = [axis.drawn(y_label)]
    for number, each in enumerate(series):
        for word, y, error in zip(each.x, each.y, each.error):
            x = _LEFT + step * (words.index(word) + 0.1) + width * number
            top, foot = sorted((axis.at(y), axis.at(0)))
            tip = f"<title>{html.escape(f'{each.label}, {word}: {y:.4g}')}</title>"
            box = f'x="{x:.1f}" y="{top:.1f}" width="{width * 0.94:.1f}" height="{max(foot - top, 0.5):.1f}"'
            parts.append(f'<rect {box} fill="{_color(number)}">{tip}</rect>')
            parts.append(axis.whisker(x + width * 0.47, y, error))
    for number, word in enumerate(words):
        parts.append(_text(_LEFT + step * (number + 0.5), _HEIGHT - _BOTTOM + 16, str(word), "middle"))
    return _page(title, series, parts)


def lines(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Lines over numbers, by their logarithm where they span more than a factor of eight."""
    xs = sorted({float(x) for each in series for x in each.x})
    by_log = xs[0] > 0 and xs[-1] / xs[0] > 8
    place = math.log if by_log else float
    low, high = place(xs[0]), place(xs[-1])

    def at(x: float) -> float:
        return _LEFT + 20 + (place(float(x)) - low) / ((high - low) or 1.0) * (_WIDTH - _LEFT - 50)

    axis = _Axis(series, from_zero=False)
    parts = [axis.drawn(y_label)]
    for number, each in enumerate(series):
        points = " ".join(f"{at(x):.1f},{axis.at(y):.1f}" for x, y in zip(each.x, each.y))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_color(number)}" stroke-width="2"/>')
        for x, y, error in zip(each.x, each.y, each.error):
            tip = f"<title>{html.escape(f'{each.label}, {x}: {y:.4g}')}</title>"
            parts.append(
                f'<circle cx="{at(x):.1f}" cy="{axis.at(y):.1f}" r="3.5" fill="{_color(number)}">{tip}</circle>'
            )
            parts.append(axis.whisker(at(x), y, error))
    parts += [_text(at(x), _HEIGHT - _BOTTOM + 16, f"{x:g}", "middle") for x in xs]
    parts.append(_text(_WIDTH / 2, _HEIGHT - _BOTTOM + 34, x_label, "middle"))
    return _page(title, series, parts)


class _Axis:
    """From values to pixels, zero included where bars stand on it."""

    def __init__(self, series: Sequence[Series], from_zero: bool):
        values = [(y, error or 0.0) for each in series for y, error in zip(each.y, each.error)]
        low, high = min(y - e for y, e in values), max(y + e for y, e in values)
        self.low, self.high = (min(low, 0.0), max(high, 0.0)) if from_zero else (low, high)
        if self.low == self.high:
            self.high += 1.0

    def at(self, y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - self.low) / (self.high - self.low) * (_HEIGHT - _BOTTOM - _TOP)

    def whisker(self, x: float, y: float, error: float | None) -> str:
        if not error:
            return ""
        return (
            f'<path d="M{x:.1f} {self.at(y - error):.1f}V{self.at(y + error):.1f}" stroke="#333" stroke-width="1.2"/>'
        )

    def drawn(self, label: str) -> str:
        ticks = [self.low + (self.high - self.low) * i / 4 for i in range(5)]
        grid = f'<path d="M{_LEFT} {{0:.1f}}H{_WIDTH - 10}" stroke="#ddd"/>'
        parts = [grid.format(self.at(y)) + _text(_LEFT - 6, self.at(y) + 4, f"{y:.3g}", "end") for y in ticks]
        turned = f'<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{html.escape(label)}</text>'
        return "".join(parts) + turned


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _page(title: str, series: Sequence[Series], parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    style = 'style="font: 12px system-ui, sans-serif; background: #fff"'
    legend, x = [_text(_LEFT, 16, title)], _LEFT + 8.0 * len(title)
    for number, each in enumerate(series):
        legend.append(f'<rect x="{x:.0f}" y="7" width="10" height="10" fill="{_color(number)}"/>')
        legend.append(_text(x + 14, 16, each.label))
        x += 30 + 6.5 * len(each.label)
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *legend, *parts, "</svg>"])
