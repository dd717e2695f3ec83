"""Maps of embeddings as pictures, pages, characters and records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmctl.pictures.embedding_map import EmbeddingMap
from llmctl.plotting import figure, page


def save(drawn: EmbeddingMap, path: str | Path, overwrite: bool = False) -> None:
    """Write what the ending of `path` names: .png, .svg, .pdf, or a page of its own, .html."""
    if figure.format_of(path, also=("html",)) == "html":
        page.save(_title(drawn), page.scatter(drawn.labels, drawn.points, drawn.axes), path, overwrite)
        return
    picture = figure.new(path, 10, 7)
    axes = picture.subplots()
    axes.scatter(*zip(*drawn.points), s=12)
    for label, point in zip(drawn.labels, drawn.points):
        text = label if len(label) <= 40 else f"{label[:39]}…"
        axes.annotate(text, point, xytext=(3, 3), textcoords="offset points", fontsize=8, parse_math=False)
    axes.set_title(_title(drawn))
    axes.set_xlabel(drawn.axes[0])
    axes.set_ylabel(drawn.axes[1])
    axes.grid(alpha=0.3)
    figure.write(picture, path, overwrite)


def draw(drawn: EmbeddingMap, width: int, height: int = 24) -> str:
    """The labels at their places, `width` x `height` characters; one that would cover another is cut to a dot or left out."""
    rows = [[" "] * width for _ in range(height)]
    for label, (x, y) in zip(drawn.labels, _cells(drawn.points, width, height)):
        for text in (f"•{label}", "•"):
            cells = rows[y][x : x + len(text) + 1]
            if len(cells) >= len(text) and not "".join(cells).strip():
                rows[y][x : x + len(text)] = text
                break
    lines = ["".join(row).rstrip() for row in rows]
    return "\n".join([f"{_title(drawn)}: {drawn.axes[0]} across, {drawn.axes[1]} up", *lines])


def records(drawn: EmbeddingMap) -> Iterator[dict[str, Any]]:
    """One for each point."""
    for label, (x, y) in zip(drawn.labels, drawn.points):
        yield {"kind": "embedding", "text": label, "x": x, "y": y}


def _title(drawn: EmbeddingMap) -> str:
    return f"embeddings of {drawn.kind}"


def _cells(points: list[tuple[float, float]], width: int, height: int) -> Iterator[tuple[int, int]]:
    """Column and row of each point, with room for a label on its right."""
    across, up = zip(*points)
    spans = [(min(values), (max(values) - min(values)) or 1.0) for values in (across, up)]
    for x, y in points:
        column = round((x - spans[0][0]) / spans[0][1] * max(width - 16, 1))
        yield column, height - 1 - round((y - spans[1][0]) / spans[1][1] * (height - 1))
