"""`llmctl copy`: like cat, and it can be slow, fail, or make a directory; it counts its runs in $RUNS."""

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
@click.option("--directory", is_flag=True, help="Make the output a directory.")
def command(files, output, labels, mark, fail, seconds, directory):
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
        return
    if directory:
        Path(output).mkdir(parents=True)
    with open(Path(output, "text") if directory else output, "x") as file:
        file.write(text)
    ui.print_data(str(Path(output).absolute()))


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
