"""Pictures by matplotlib, where it is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.errors import CalledWrongly, UserError
from llmctl.files import refuse_existing, staged_file
from llmctl.plotting.curves import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")


def format_of(path: str | Path, *, also: tuple[str, ...] = ()) -> str:
    """The format that the ending of `path` names: one of FORMATS or of `also`."""
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in (*FORMATS, *also):
        raise CalledWrongly(f"{path}: expected a name ending in {', '.join('.' + name for name in (*FORMATS, *also))}")
    return kind


def refuse(path: str | Path, overwrite: bool) -> None:
    """Raise, before any work, for an output that could not be written: CalledWrongly for its name."""
    if format_of(path, also=("html",)) != "html":
        new(path, 1, 1)
    refuse_existing(path, overwrite)


def new(path: str | Path, width: float, height: float) -> Figure:
    """An empty figure of so many inches, for `write` to `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"{path}: pictures need matplotlib, which is not installed",
            hint="pip install matplotlib, or leave out --output to draw in the terminal",
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def write(figure: Figure, path: str | Path, overwrite: bool = False) -> None:
    with staged_file(path, overwrite=overwrite) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for what the font lacks
        figure.savefig(file, format=format_of(path), dpi=150)


def save(curves: list[Curve], x: str, y: str, path: str | Path, overwrite: bool = False) -> None:
    """Write the chart of training curves in the format that the ending of `path` names, one of FORMATS."""
    format_of(path)
    figure = new(path, 8, 5)
    axes = figure.subplots()
    for curve in curves:
        style = {"marker": "o", "markersize": 3, "linestyle": "--"} if curve.is_validation else {}
        axes.plot(curve.x, curve.y, label=curve.label, linewidth=1.2, **style)
    axes.set_xlabel("seconds" if x == "time" else x)
    axes.set_ylabel(y.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    write(figure, path, overwrite)
