"""The same chart as a picture, by matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path

from llmctl.errors import CalledWrongly, UserError
from llmctl.files import staged_file
from llmctl.plotting.curves import Curve

FORMATS = ("png", "svg", "pdf")


def save(curves: list[Curve], x: str, y: str, path: str | Path, overwrite: bool = False) -> None:
    """Write the chart in the format that the ending of `path` names, one of FORMATS."""
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise CalledWrongly(f"{path}: expected a name ending in {', '.join('.' + name for name in FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"{path}: pictures need matplotlib, which is not installed",
            hint="pip install matplotlib, or leave out --output to draw in the terminal",
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        style = {"marker": "o", "markersize": 3, "linestyle": "--"} if curve.is_validation else {}
        axes.plot(curve.x, curve.y, label=curve.label, linewidth=1.2, **style)
    axes.set_xlabel("seconds" if x == "time" else x)
    axes.set_ylabel(y.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    with staged_file(path, overwrite=overwrite) as file:
        figure.savefig(file, format=kind, dpi=150)
