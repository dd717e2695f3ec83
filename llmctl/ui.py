"""What commands show a person, all of it on standard error: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import click

from llmctl.errors import UserError
from llmctl.quantities import format_count, format_duration, format_size

_SECONDS_BETWEEN_LINES = 10.0


def is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def is_main_process() -> bool:
    """Whether this is the process that speaks, where torchrun started several."""
    return os.environ.get("RANK", "0") == "0"


def is_quiet() -> bool:
    ctx = click.get_current_context(silent=True)
    return not is_main_process() or bool(ctx and ctx.meta.get("llmctl.quiet"))


def print_data(text: str, end: str = "\n") -> None:
    """Write a result to standard output at once, so that the next command in a pipe can start."""
    if sys.stdout is None:
        raise UserError("standard output is closed, so the result has nowhere to go")
    sys.stdout.write(text + end)
    sys.stdout.flush()


def message(text: str) -> None:
    """Write a line for a person."""
    # Not click.echo: it would write past rich, into the middle of a progress bar.
    print(text, file=sys.stderr, flush=True)


def note(text: str) -> None:
    if not is_quiet():
        message(f"note: {text}")


def console():
    """A rich console on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=is_quiet())


def table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """A table for a person: right-aligned where every cell of a column is a number."""
    if is_quiet():
        return
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(_is_numeric(row[i]) for row in cells) for i in range(len(columns))]
    if is_terminal():
        _rich_table(title, columns, cells, right)
        return
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    message(title)
    for row in [columns, *cells]:
        padded = [
            f"{text:>{width}}" if r else f"{text:<{width}}" for text, width, r in zip(row, widths, right, strict=True)
        ]
        message(("  " + "  ".join(padded)).rstrip())


def _rich_table(title, columns, cells, right):
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=escape(title), title_justify="left")
    for name, is_right in zip(columns, right, strict=True):
        drawn.add_column(escape(name), justify="right" if is_right else "left")
    for row in cells:
        drawn.add_row(*map(escape, row))
    console().print(drawn)


def _is_numeric(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-+.~" and text[1:2].isdigit()


@contextlib.contextmanager
def progress(description: str, total: float | None = None, unit: str = ""):
    """Yield an object whose `.update(completed, note="")` shows how far the work is; unit "B" means bytes."""
    if is_quiet():
        yield _Silence()
    elif is_terminal():
        with _bar(total is None) as bar:
            yield _Bar(bar, description, total, unit)
    else:
        lines = _Lines(description, total, unit)
        yield lines
        lines.finish()


@contextlib.contextmanager
def late_progress(description: str, unit: str = ""):
    """Yield a function like `.update` of `progress`, which shows nothing before it is called: there may be no work."""
    with contextlib.ExitStack() as stack:
        begun = []

        def update(completed: float, note: str = "") -> None:
            if not begun:
                begun.append(stack.enter_context(progress(description, unit=unit)))
            begun[0].update(completed, note)

        yield update


class _Silence:
    def update(self, completed: float, note: str = "") -> None:
        pass


class _Lines:
    """Progress for a log file: one line at most every ten seconds, and one at the end."""

    def __init__(self, description, total, unit):
        self.description, self.total, self.unit = description, total, unit
        self.started = self.printed = time.monotonic()
        self.last = None

    def update(self, completed: float, note: str = "") -> None:
        self.last = (completed, note)
        if time.monotonic() - self.printed >= _SECONDS_BETWEEN_LINES:
            self._print()

    def finish(self) -> None:
        if self.last is not None:
            self._print()

    def _print(self):
        completed, note = self.last
        self.last, self.printed = None, time.monotonic()
        seconds = max(self.printed - self.started, 1e-9)
        parts = [_how_far(completed, self.total, self.unit), f"{_amount(completed / seconds, self.unit)}/s"]
        if self.total and 0 < completed < self.total:
            parts.append(f"{format_duration(seconds * (self.total - completed) / completed)} left")
        message(f"{self.description}: " + ", ".join(part for part in [*parts, note] if part))


class _Bar:
    """Progress on a terminal, drawn by rich."""

    def __init__(self, bar, description, total, unit):
        self.bar, self.total, self.unit = bar, total, unit
        self.started = time.monotonic()
        self.task = bar.add_task(description, total=total, shown="", note="")

    def update(self, completed: float, note: str = "") -> None:
        rate = completed / max(time.monotonic() - self.started, 1e-9)
        shown = f"{_how_far(completed, self.total, self.unit)}  {_amount(rate, self.unit)}/s"
        self.bar.update(self.task, completed=completed, shown=shown, note=note)


def _bar(endless: bool):
    from rich import progress as rich

    columns = [
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[shown]}"),
    ]
    if not endless:
        columns.append(rich.TimeRemainingColumn(compact=True))
    return rich.Progress(*columns, rich.TextColumn("{task.fields[note]}", markup=False), console=console())


def _how_far(completed, total, unit) -> str:
    if not total:
        return _amount(completed, unit)
    return f"{_amount(completed, unit)} of {_amount(total, unit)} ({100 * completed / total:.0f} %)"


def _amount(number: float, unit: str) -> str:
    return format_size(number) if unit == "B" else f"{format_count(number)} {unit}".rstrip()
