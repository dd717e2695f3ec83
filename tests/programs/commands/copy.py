"""`llmctl copy`: like cat, and it can be slow, fail, or make a checkpoint; it counts its runs in $RUNS."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import click

from llmctl import options, ui


@options.command(examples="llmctl copy a.txt b.txt")
@click.argument("files", nargs=-1, type=options.PATH)
@options.output_option
@click.option("--label", "labels", multiple=True, help="Text to add at the end.")
@click.option("--mark", help="What to write to $RUNS beside the process's parameters.")
@click.option("--fail", type=options.INT, help="The exit code to end with.")
@click.option("--seconds", type=options.DURATION, default=0.0, help="How long to sleep, noting signals.")
@click.option("--checkpoint/--file", help="Make the output a directory and print its path.")
def command(files, output, labels, mark, fail, seconds, checkpoint):
    """Copy files, or standard input, to standard output."""
    with open(os.environ["RUNS"], "a") as runs:
        runs.write(f"{mark}\n")
    _sleep(seconds)
    if fail is not None:
        sys.exit(fail)
    text = "".join(sys.stdin.read() if name == "-" else Path(name).read_text() for name in files or ["-"])
    text += "".join(labels)
    if not output:
        ui.print_data(text, end="")
    elif checkpoint:
        directory = Path(output)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        (directory / "text").write_text(text)
        ui.print_data(str(directory.absolute()))
    else:
        with open(output, "x") as file:
            file.write(text)


def _sleep(seconds):
    def note_and_stop(number, frame):
        with open(os.environ["RUNS"], "a") as runs:
            runs.write(f"signal {number}\n")
        sys.exit(128 + number)

    if seconds:
        signal.signal(signal.SIGINT, note_and_stop)
        signal.signal(signal.SIGTERM, note_and_stop)
        with open(os.environ["RUNS"], "a") as runs:
            runs.write("asleep\n")
        time.sleep(seconds)
