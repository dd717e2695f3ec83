"""How a training run looks to a person, and the logs that others draw; used by the commands that train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmctl import ui
from llmctl.loggers import LOGGERS
from llmctl.quantities import format_count, format_duration, format_size
from llmctl.train.events import Compared, Event, Finished, Planned, Saved, Started, Trained, Validated

if TYPE_CHECKING:
    from llmctl.train.run import Run


class Reports:
    """Shows events on standard error, one line each, and passes numbers on to `loggers` ("tensorboard", "wandb").

    A standard error that nobody reads any more does not end the run. Raises CalledWrongly for a logger not installed.
    """

    def __init__(self, loggers: tuple[str, ...], run: Path):
        self._run, self._sinks, self._is_heard = run, [], not ui.is_quiet()
        self._kinds = [LOGGERS[name] for name in dict.fromkeys(loggers)] if ui.is_main_process() else []
        for kind in self._kinds:
            kind.require()

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        for sink in self._sinks:
            sink.close(exit_code=0 if error is None else 1)

    def show(self, event: Event) -> None:
        if self._is_heard:
            self._say(line(event))
        if isinstance(event, Started):  # not before: until then the output may still be refused
            self._sinks = [kind(self._run, event.step) for kind in self._kinds]
        if isinstance(event, (Trained, Validated)):
            for sink in self._sinks:
                sink.log(_numbers(event), event.step)

    def _say(self, text: str) -> None:
        try:
            click.echo(text, err=True)
        except OSError:
            self._is_heard = False


def show_run(run: Run) -> None:
    """Run it to its end and print the path of what it made; or, of a dry run, the table of what it would take."""
    if run.settings.dry_run:
        ui.table("dry run", ["", ""], _dry_run_rows(run.dry_run()))
        return
    with Reports(run.settings.log, run.directory.path) as reports:
        for event in run.run():
            if isinstance(event, Compared):
                ui.table("before and after", ["", "before", "after", "change"], list(_comparison(event)))
            else:
                reports.show(event)
    ui.print_data(str(run.directory.path))


def line(event: Event) -> str:
    """One line for a person."""
    match event:
        case Started():
            going_on = f", going on from step {event.step}" if event.step else ""
            return (
                f"{format_count(event.n_parameters)} parameters ({event.shape}); "
                f"{format_count(event.train_tokens)} training and {format_count(event.val_tokens)} validation tokens, "
                f"{format_count(event.tokens_per_step)} a step; {event.device} in {event.dtype}, "
                f"peak {event.peak_flops / 1e12:.2f} TFLOP/s{going_on}"
            )
        case Planned():
            return f"{event.total_steps} steps, {event.epochs:.2f} epochs"
        case Trained():
            left = "" if event.seconds_left is None else f"  {format_duration(event.seconds_left)} left"
            balance = "" if event.balance_loss is None else f"balance {event.balance_loss:.4f}  "
            return (
                f"step {event.step}/{event.total_steps or '?'}  loss {event.loss:.4f}  {balance}lr {event.lr:.2e}  "
                f"grad {event.grad_norm:.2f}  {format_count(event.tokens_per_second)} tokens/s  MFU {event.mfu:.0%}  "
                f"{format_size(event.memory_bytes)}{left}"
            )
        case Validated():
            bits = "" if event.bits_per_byte is None else f", {event.bits_per_byte:.4f} bits per byte"
            more = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in event.metrics.items())
            return f"step {event.step}  validation {event.loss:.4f} {event.measure} per {event.unit}{bits}{more}"
        case Saved():
            return f"step {event.step}  saved {event.path}"
        case Finished():
            return f"finished {event.step} steps in {format_duration(event.seconds)}: {event.path}"


def _comparison(event: Compared) -> Iterator[list[str]]:
    """A loss that fell was gained, one that rose lost."""
    for name, (before, after) in event.rows.items():
        yield [name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f} {'gained' if after < before else 'lost'}"]


def _dry_run_rows(found: dict) -> list[list[str]]:
    """The rows of a table for what `Pretraining.dry_run` found."""
    return [
        ["shape", found["shape"]],
        ["parameters", format_count(found["parameters"])],
        ["steps", f"{found['steps']} of {format_count(found['tokens_per_step'])} tokens, {found['epochs']:.2f} epochs"],
        ["compute", f"{found['flops']:.2e} FLOPs"],
        ["peak memory", format_size(found["memory_bytes"])],
        ["disk", format_size(found["disk_bytes"])],
        ["speed", f"{format_count(found['tokens_per_second'])} tokens/s"],
        ["time", format_duration(found["seconds"])],
    ]


def _numbers(event: Trained | Validated) -> dict[str, float]:
    if isinstance(event, Validated):
        return {f"validation/{name}": value for name, value in event.numbers.items()}
    kept = ("loss", "balance_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "tokens")
    named = {f"train/{name}": getattr(event, name) for name in kept}
    return {name: value for name, value in named.items() if value is not None}
