"""Attention maps as pictures, pages, characters and records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmctl.pictures.attention_map import AttentionMap, Panel
from llmctl.plotting import figure, page

_SHADES = " ░▒▓█"


def save(drawn: AttentionMap, path: str | Path, overwrite: bool = False) -> None:
    """Write what the ending of `path` names: .png, .svg, .pdf, or a page of its own, .html."""
    if figure.format_of(path, also=("html",)) == "html":
        panels = [{"title": panel.title, "weights": _rounded(panel)} for panel in drawn.panels]
        page.save(_title(drawn), page.heatmaps(panels, drawn.queries, drawn.keys), path, overwrite)
    else:
        _save_figure(drawn, path, overwrite)


def draw(drawn: AttentionMap, width: int) -> str:
    """The maps in characters, darker for more, each on its own scale; columns are numbered as the rows are."""
    digits = len(str(max(len(drawn.queries), len(drawn.keys)) - 1))
    margin = max(map(len, drawn.queries)) + digits + 2
    times = 2 if margin + 2 * len(drawn.keys) <= width else 1
    lines = []
    for panel in drawn.panels:
        most = float(panel.weights_TS.max()) or 1.0
        lines.append(f"{_title(drawn)}, {panel.title}: █ is {most:.2f}")
        lines.append(" " * margin + "".join(str(s % 10).ljust(times) for s in range(len(drawn.keys))))
        for t, (label, row) in enumerate(zip(drawn.queries, panel.weights_TS.tolist())):
            cells = "".join(_SHADES[math.ceil(weight / most * 4 - 0.1)] * times for weight in row)
            lines.append(f"{t:>{digits}} {label:>{margin - digits - 2}} {cells}".rstrip())
    if drawn.keys != drawn.queries:
        lines.append("  ".join(f"{s} {label}" for s, label in enumerate(drawn.keys)))
    return "\n".join(lines)


def records(drawn: AttentionMap) -> Iterator[dict[str, Any]]:
    """One for each map."""
    for panel in drawn.panels:
        yield {
            "kind": "attention",
            "part": drawn.part or None,
            "layer": panel.layer,
            "head": panel.head,
            "queries": drawn.queries,
            "keys": drawn.keys,
            "weights": _rounded(panel, 6),
        }


def _save_figure(drawn: AttentionMap, path: str | Path, overwrite: bool) -> None:
    columns = math.ceil(math.sqrt(len(drawn.panels)))
    rows = math.ceil(len(drawn.panels) / columns)
    side = min(10.0, max(3.0, 0.22 * max(len(drawn.queries), len(drawn.keys)) + 1))
    size = side if len(drawn.panels) == 1 else min(side, 30 / columns)
    picture = figure.new(path, size * columns + 1, size * rows)
    grid = picture.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(drawn.panels):
            axes.set_visible(False)
            continue
        panel = drawn.panels[number]
        image = axes.imshow(panel.weights_TS.numpy(), cmap="Blues", vmin=0.0, aspect="auto", interpolation="nearest")
        picture.colorbar(image, ax=axes, fraction=0.04)
        axes.set_title(panel.title, fontsize=9)
        for axis, names in ((axes.xaxis, drawn.keys), (axes.yaxis, drawn.queries)):
            points = min(9.0, max(2.0, 60 * size / len(names) * 0.7))
            turn = 90 if axis is axes.xaxis else 0
            axis.set_ticks(range(len(names)), names, fontsize=points, rotation=turn, parse_math=False)
    picture.suptitle(_title(drawn))
    figure.write(picture, path, overwrite)


def _title(drawn: AttentionMap) -> str:
    names = {"": "attention", "cross": "cross-attention"}
    return names.get(drawn.part, f"attention of the {drawn.part}")


def _rounded(panel: Panel, digits: int = 4) -> list[list[float]]:
    return [[round(weight, digits) for weight in row] for row in panel.weights_TS.tolist()]
