"""`llmctl plot`: loss curves in the terminal or as a picture."""

from __future__ import annotations

import os
import shutil
import sys

import click

from llmctl import options, ui


@options.command(
    examples="""
    llmctl plot runs/base
    llmctl plot runs/base runs/wide --x time --y bits_per_byte
    llmctl plot runs/base --smooth 0.9 -o loss.png
    """
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=options.PATH)
@click.option(
    "--x",
    type=click.Choice(("step", "tokens", "time")),
    default="step",
    cls=options.Option,
    help="The horizontal axis.",
)
@click.option(
    "--y",
    default="loss",
    cls=options.Option,
    help="The metric: any number in metrics.jsonl, such as bits_per_byte, lr, tokens_per_second.",
)
@click.option(
    "--smooth",
    type=options.FLOAT.limited({"at_least": 0, "at_most": 0.999}),
    default=0.0,
    cls=options.Option,
    help="Weight of the past in a moving average of the training curve.",
)
@options.output_option(help="Write a picture (.png, .svg or .pdf) instead; needs matplotlib.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
def command(runs, x, y, smooth, output, overwrite):
    """Draw the curves of training runs, one RUN (an output directory or a metrics.jsonl) or several in one chart.

    With --output a picture is written, and its path printed when it is complete.
    """
    from llmctl.plotting import curves, figure, terminal

    drawn = [curve for run in runs for curve in curves.read_curves(run, x, y.replace("-", "_"), smooth)]
    if output:
        figure.save(drawn, x, y, output, overwrite=overwrite)
        ui.print_data(os.path.abspath(output))
        return
    size = shutil.get_terminal_size((100, 24))
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ui.print_data(terminal.draw(drawn, x, y, size.columns, min(max(size.lines - 5, 8), 24), color))
