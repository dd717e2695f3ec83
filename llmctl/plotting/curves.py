"""Curves from the metrics.jsonl that a training run leaves in its output directory."""

from __future__ import annotations

import bisect
import json
import math
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import UserError

# What a person calls the horizontal axis, to the key of a metrics line.
X_KEYS = {"step": "step", "tokens": "tokens", "time": "seconds"}


@dataclass(frozen=True)
class Curve:
    """Points in order of x; `is_validation` curves have few of them."""

    label: str
    x: list[float]
    y: list[float]
    is_validation: bool = False


def read_curves(run: str | Path, x: str, y: str, smooth: float = 0.0) -> list[Curve]:
    """The training and the validation curve of key `y` over `x`, one of X_KEYS; the training curve is smoothed.

    `run` is a run's directory or a metrics.jsonl. Raises UserError for one that has no such metric.
    """
    events = _read_events(Path(run))
    clock = _clock(events["train"], X_KEYS[x])
    curves = []
    for kind, by_step in events.items():
        points = [(clock(step), event[y]) for step, event in sorted(by_step.items()) if _is_number(event.get(y))]
        points = [point for point in points if point[0] is not None]
        if points:
            xs, ys = map(list, zip(*points, strict=True))
            is_validation = kind == "validation"
            curves.append(Curve(f"{run} {kind}", xs, ys if is_validation else _smoothed(ys, smooth), is_validation))
    if not curves:
        known = {key for by_step in events.values() for event in by_step.values() for key in event if key != "event"}
        raise UserError(f"{run}: no metric '{y}' in it", hint=f"there are {', '.join(sorted(known)) or 'none yet'}")
    return curves


def _read_events(run: Path) -> dict[str, dict[int, dict]]:
    """Events by kind and step; where a resumed run repeats a step, the later event counts."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.exists():
        raise UserError(f"{path}: no such metrics", hint="give the output directory of a training run")
    lines = path.read_text(encoding="utf-8").split("\n")
    events: dict[str, dict[int, dict]] = {"train": {}, "validation": {}}
    # What follows the last line break is a line still being written, or cut off by a crash.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = json.loads(line)
            if event.get("event") in events:
                events[event["event"]][int(event["step"])] = event
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a line of metrics: {line[:60]}") from error
    return events


def _clock(train: dict[int, dict], key: str):
    """A function from a step to its x; validation lines have none of their own, so they take that of their step."""
    if key == "step":
        return float
    known = sorted((step, float(event[key])) for step, event in train.items() if _is_number(event.get(key)))
    steps = [step for step, _ in known]

    def at(step: int) -> float | None:
        i = bisect.bisect_right(steps, step) - 1
        return known[max(i, 0)][1] if known else None

    return at


def _smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, smoothed = 0.0, []
    for i, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**i))
    return smoothed


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
