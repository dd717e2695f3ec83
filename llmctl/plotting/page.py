"""Pictures as one HTML file that needs nothing else: no library, no network."""

from __future__ import annotations

import html
import json
from pathlib import Path

from llmctl.files import staged_file

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; }}
figure {{ display: inline-block; margin: 0 1.5em 1.5em 0; vertical-align: top; }}
figcaption {{ font-weight: 600; margin-bottom: .3em; }}
#at {{ position: fixed; top: 0; right: 0; padding: .5em 1em; background: #222; color: #fff; }}
#at:empty {{ display: none; }}
svg text {{ font: 11px system-ui, sans-serif; }}
svg circle:hover {{ fill: #d62728; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

HEATMAPS = """<div id="maps"></div>
<div id="at"></div>
<script>
const data = {data};
const cell = Math.max(3, Math.min(22, 600 / Math.max(data.keys.length, data.queries.length)));
const font = Math.min(13, cell * 0.75) + "px monospace", at = document.getElementById("at");
const measure = document.createElement("canvas").getContext("2d");
measure.font = font;
const longest = names => Math.max(...names.map(name => measure.measureText(name).width)) + 6;
const left = longest(data.queries), top_ = longest(data.keys);
for (const panel of data.panels) {{
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  figure.innerHTML = "<figcaption></figcaption>";
  figure.firstChild.textContent = panel.title;
  canvas.width = left + cell * data.keys.length;
  canvas.height = top_ + cell * data.queries.length;
  const draw = canvas.getContext("2d"), most = Math.max(...panel.weights.map(row => Math.max(...row)), 1e-9);
  draw.font = font;
  draw.textBaseline = "middle";
  draw.textAlign = "right";
  data.queries.forEach((name, t) => draw.fillText(name, left - 3, top_ + cell * (t + 0.5)));
  draw.textAlign = "left";
  data.keys.forEach((name, s) => {{
    draw.save();
    draw.translate(left + cell * (s + 0.5), top_ - 3);
    draw.rotate(-Math.PI / 2);
    draw.fillText(name, 0, 0);
    draw.restore();
  }});
  panel.weights.forEach((row, t) => row.forEach((weight, s) => {{
    draw.fillStyle = `hsl(215 75% ${{97 - 72 * weight / most}}%)`;
    draw.fillRect(left + cell * s, top_ + cell * t, Math.ceil(cell), Math.ceil(cell));
  }}));
  canvas.onmousemove = event => {{
    const s = Math.floor((event.offsetX - left) / cell), t = Math.floor((event.offsetY - top_) / cell);
    const inside = s >= 0 && t >= 0 && s < data.keys.length && t < data.queries.length;
    at.textContent = inside ? `${{data.queries[t]}} → ${{data.keys[s]}}: ${{panel.weights[t][s].toFixed(4)}}` : "";
  }};
  canvas.onmouseleave = () => at.textContent = "";
  figure.append(canvas);
  document.getElementById("maps").append(figure);
}}
</script>"""


def save(title: str, body: str, path: str | Path, overwrite: bool = False) -> None:
    with staged_file(path, overwrite=overwrite) as file:
        file.write(_PAGE.format(title=html.escape(title), body=body).encode())


def heatmaps(panels: list[dict], queries: list[str], keys: list[str]) -> str:
    """The body of a page of heat maps: `panels` have a "title" and "weights", rows of numbers."""
    data = json.dumps({"panels": panels, "queries": queries, "keys": keys}, ensure_ascii=False)
    return HEATMAPS.format(data=data.replace("<", "\\u003c"))  # nothing in a text can end the script


def scatter(labels: list[str], points: list[tuple[float, float]], axes: tuple[str, str]) -> str:
    """The body of a page with labelled points."""
    width, height, margin = 1000, 700, 60
    scaled = zip(*(_scaled(values, size, margin) for values, size in zip(zip(*points), (width, height))))
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">']
    for label, (x, y) in zip(labels, scaled):
        name, y = html.escape(label), height - y
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f77b4"><title>{name}</title></circle>')
        shown = html.escape(label if len(label) <= 40 else f"{label[:39]}…")
        parts.append(f'<text x="{x + 5:.1f}" y="{y + 4:.1f}">{shown}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 5}" text-anchor="middle">{html.escape(axes[0])}</text>')
    turned = f'transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle"'
    return "\n".join([*parts, f"<text {turned}>{html.escape(axes[1])}</text>", "</svg>"])


def _scaled(values: tuple[float, ...], size: int, margin: int) -> list[float]:
    low, high = min(values), max(values)
    return [margin + (value - low) / ((high - low) or 1.0) * (size - 2 * margin) for value in values]
