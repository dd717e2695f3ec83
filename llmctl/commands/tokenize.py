"""`llmctl tokenize`: text to a token stream."""

from __future__ import annotations

import contextlib
import os
import sys

import click

from llmctl import options, ui
from llmctl.data.tokenize_settings import TokenizeSettings
from llmctl.errors import CalledWrongly
from llmctl.quantities import format_count, format_size


@options.command(
    examples="""
    cat corpus.txt | llmctl tokenize | llmctl pretrain -o runs/base
    llmctl tokenize books/*.txt --val-fraction 0.1 -o books.arrow
    llmctl tokenize crawl-*.jsonl.zst --tokenizer runs/base --shard-tokens 200M -o tokens/
    llmctl tokenize corpus.txt --special-tokens encoder | llmctl pretrain --family roberta -o runs/encoder
    zcat notes.gz | llmctl tokenize --split blank-line --tokenizer bytes > notes.arrow
    """
)
@click.argument("files", nargs=-1, type=options.PATH, metavar="[FILES…|-]")
@options.output_option(
    help="A file (its name ends in .arrow) or a directory of shards; else the stream goes to stdout."
)
@options.settings(TokenizeSettings)
def command(files, output, settings):
    """Turn text into tokens.

    Reads plain text, .jsonl and .parquet, each also as .gz or .zst, and writes an Arrow IPC stream that carries its
    tokenizer. With --output the path is printed when it is complete.
    """
    files = list(files) or ["-"]
    _check(files, output, settings)
    if settings.workers:
        os.environ["RAYON_NUM_THREADS"] = str(settings.workers)  # read by the tokenizers library when it starts
    from llmctl.data.tokenize import tokenize

    with _Bars() as bars:
        counts = tokenize(files, output or sys.stdout.buffer, settings, bars.show)
    rows = []
    for split, n in counts.items():
        ratio = n["bytes"] / max(n["tokens"], 1)
        rows.append([split, n["documents"], n["tokens"], format_size(n["bytes"]), f"{ratio:.3f}"])
    ui.table("tokenized", ["split", "documents", "tokens", "text", "bytes per token"], rows)
    if output:
        ui.print_data(os.path.abspath(output))


def _check(files, output, settings):
    if files.count("-") > 1:
        raise CalledWrongly("standard input (-) can be read once only")
    if "-" in files and sys.stdin is not None and sys.stdin.isatty():
        raise CalledWrongly("no text: standard input is a terminal", hint="give FILES, or pipe text into the command")
    if not output and (sys.stdout is None or sys.stdout.isatty()):
        raise CalledWrongly(
            "a token stream is nothing for a terminal", hint="write it to a file with -o corpus.arrow, or pipe it on"
        )
    for name in ("vocab_size", "train_sample", "special_tokens"):
        if settings.tokenizer and options.given(name):
            raise CalledWrongly(f"--{name.replace('_', '-')} is for training a tokenizer, but --tokenizer names one")


class _Bars(contextlib.ExitStack):
    """A progress bar for each stage of the work."""

    stage = None

    def show(self, progress):
        if progress.stage != self.stage:
            self.close()
            self.stage = progress.stage
            self.bar = self.enter_context(ui.progress(progress.stage, progress.bytes_total, "B"))
        self.bar.update(progress.bytes_read, f"{format_count(progress.tokens)} tokens" if progress.tokens else "")
