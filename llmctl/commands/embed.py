"""`llmctl embed`: a vector for each text."""

from __future__ import annotations

import os
import sys

import click

from llmctl import options, ui
from llmctl.embedding.settings import EmbedSettings
from llmctl.errors import CalledWrongly


@options.command(
    examples="""
    llmctl embed runs/encoder sentences.txt > vectors.jsonl
    llmctl embed runs/encoder proteins.jsonl --pooling mean -o proteins.npy
    cat questions.txt | llmctl embed runs/base --pooling last --normalize | jq -c .embedding
    llmctl embed runs/encoder corpus.jsonl.zst --layer -2 --on-long truncate -o corpus.arrow
    """
)
@options.model_argument
@click.argument("files", nargs=-1, type=options.PATH, metavar="[FILES…|-]")
@options.output_option(help="A file; its name ends in .jsonl, .npy or .arrow. Else JSON Lines go to stdout.")
@options.settings(EmbedSettings)
def command(model, files, output, settings):
    """Turn texts into vectors.

    MODEL is the checkpoint directory of an encoder, a decoder, or an encoder-decoder, of which the encoder is used.
    FILES hold one text in each line, or are JSON Lines with the text under --field, each also as .gz or .zst; without
    any the texts come from standard input.

    Vectors come in the order of the texts, and do not depend on --batch-size. A line of JSON has the vector under
    "embedding" and, of JSON Lines, the other keys of its row; .npy is an array float32 of texts by width; .arrow is an
    Arrow stream with the columns index and embedding.
    """
    files = list(files) or ["-"]
    _check(model, files)
    from llmctl.checkpoint import resolve_model
    from llmctl.data.text_rows import read_rows
    from llmctl.embedding import output as outputs
    from llmctl.embedding.embedder import Embedder
    from llmctl.files import refuse_existing

    if output:
        outputs.check_name(output)
        refuse_existing(output, settings.overwrite)
    embedder = Embedder.open(resolve_model(model), settings)
    vectors = embedder.embed(read_rows(files, settings.field))
    if output:
        with outputs.opened(output, embedder.width, settings.overwrite) as write, _bar() as bar:
            for number, (row, vector) in enumerate(vectors, start=1):
                write(row.rest, vector)
                bar.update(number)
        ui.print_data(os.path.abspath(output))
    else:
        for row, vector in vectors:
            ui.print_data(outputs.json_line(row.rest, vector))


def _bar():
    return ui.progress("embed", unit="texts")


def _check(model, files):
    if files.count("-") + (model == "-") > 1:
        raise CalledWrongly("standard input (-) can be read once only")
    if "-" in files and sys.stdin is not None and sys.stdin.isatty():
        raise CalledWrongly("no text: standard input is a terminal", hint="give FILES, or pipe text into the command")
