"""`llmctl plot` and the metrics it reads."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.errors import UserError
from llmctl.plotting.curves import Curve, read_curves
from llmctl.plotting.terminal import draw


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps of 1000 tokens and half a second, its loss 8 / step, validated at steps 50 and 100."""

    def write(name: str = "run", more: str = "") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        events = []
        for step in range(1, 101):
            events.append(
                {"event": "train", "step": step, "tokens": step * 1000, "seconds": step / 2, "loss": 8 / step}
            )
            if step % 50 == 0:
                events.append({"event": "validation", "step": step, "loss": 10 / step, "bits_per_byte": 1.5})
        (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events) + more)
        return directory

    return write


def test_curves_over_each_axis(run):
    path = run()
    for x, unit in (("step", 1), ("tokens", 1000), ("time", 0.5)):
        train, validation = read_curves(path, x, "loss")
        assert train.x == [step * unit for step in range(1, 101)] and train.y[3] == 2.0
        assert (validation.x, validation.y) == ([50 * unit, 100 * unit], [0.2, 0.1])
    (only,) = read_curves(path / "metrics.jsonl", "step", "bits_per_byte")
    assert only.is_validation and only.y == [1.5, 1.5]


def test_smoothing_has_no_bias_at_the_start(run):
    train, validation = read_curves(run(), "step", "loss", smooth=0.9)
    assert train.y[0] == pytest.approx(8.0) and train.y[1] == pytest.approx((0.9 * 8 + 4) / 1.9)
    assert validation.y == [0.2, 0.1]


def test_a_repeated_step_counts_once_and_a_torn_line_not_at_all(run):
    more = '{"event": "train", "step": 100, "loss": 7}\n{"event": "train", "step": 101, "loss": NaN}\n{"event": "tr'
    train, _ = read_curves(run(more=more), "step", "loss")
    assert (len(train.x), train.y[-1]) == (100, 7)


def test_what_cannot_be_read_is_told(run, tmp_path):
    with pytest.raises(UserError, match="no such metrics"):
        read_curves(tmp_path / "nowhere", "step", "loss")
    with pytest.raises(UserError, match="no metric 'perplexity'") as error:
        read_curves(run("a"), "step", "perplexity")
    assert "bits_per_byte, loss, seconds" in error.value.hint
    with pytest.raises(UserError, match=r"metrics.jsonl:103: not a line of metrics: nonsense"):
        read_curves(run("b", more="nonsense\n"), "step", "loss")


def plot_area(chart: str) -> list[str]:
    return [line.partition("┤")[2] for line in chart.splitlines() if "┤" in line]


def test_a_falling_line_falls(run):
    chart = draw([Curve("a", [0, 1], [1, 0])], "step", "loss", width=40, height=10, color=False)
    rows = plot_area(chart)
    assert len(rows) == 10 and max(map(len, chart.splitlines())) <= 40
    first_columns = [len(row) - len(row.lstrip()) for row in rows]
    assert first_columns == sorted(first_columns) and first_columns[0] == 0
    assert all(0x2800 < ord(cell) <= 0x28FF for row in rows for cell in row.strip())
    assert chart.splitlines()[-1].split() == ["0", "step", "1"]


def test_a_level_line_and_a_single_point_are_drawn():
    for curve in (Curve("a", [0, 5], [2, 2]), Curve("a", [3], [2])):
        rows = plot_area(draw([curve], "step", "loss", width=40, height=8, color=False))
        assert sum(bool(row.strip()) for row in rows) == 1


def test_several_curves_are_told_apart_without_color():
    curves = [Curve("one", [0, 1], [0, 0]), Curve("two", [0, 1], [1, 1])]
    chart = draw(curves, "step", "loss", width=60, height=8, color=False)
    assert "a one 0   b two 1" in chart
    assert set(plot_area(chart)[0]) == {"b"} and set(plot_area(chart)[-1]) == {"a"}


def test_the_command_draws_several_runs(llmctl, run):
    run("first")
    run("second")
    text = llmctl("plot", "first", "second", "--x", "time").stdout
    assert "first train" in text and "second validation" in text and "\033" not in text


def test_colors_on_a_terminal(run):
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "llmctl", "plot", str(run())]
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        while process.poll() is None or not shown:
            try:
                shown += os.read(leader, 65536)
            except OSError:
                break
    assert b"\033[36m" in shown


@pytest.mark.parametrize(("name", "start"), [("loss.png", b"\x89PNG"), ("loss.svg", b"<?xml"), ("loss.pdf", b"%PDF")])
def test_pictures(llmctl, run, tmp_path, name, start):
    pytest.importorskip("matplotlib")
    run()
    assert llmctl("plot", "run", "-o", name).stdout == f"{tmp_path / name}\n"
    assert (tmp_path / name).read_bytes().startswith(start)
    assert llmctl("plot", "run", "-o", name, code=2).stderr.startswith(f"error: {name}: exists already")
    llmctl("plot", "run", "-o", name, "--overwrite")


def test_a_picture_of_no_known_kind(llmctl, run):
    run()
    assert llmctl("plot", "run", "-o", "loss.bmp", code=2).stderr.startswith(
        "error: loss.bmp: expected a name ending in"
    )


def test_a_picture_without_matplotlib(llmctl, run, tmp_path, monkeypatch):
    run()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    stderr = llmctl("plot", "run", "-o", "loss.png", code=1).stderr
    assert "need matplotlib" in stderr and "pip install matplotlib" in stderr
