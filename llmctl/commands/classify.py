"""`llmctl classify`: labels, values or rewards of texts."""

from __future__ import annotations

import json
import sys

import click

from llmctl import options, ui
from llmctl.errors import CalledWrongly


@options.command(
    examples="""
    llmctl classify runs/sentiment reviews.txt | jq -r .predicted
    llmctl classify runs/fitness variants.jsonl > scored.jsonl
    llmctl finetune runs/base rows.jsonl --objective classify -o runs/labels | llmctl classify - texts.txt
    cat answers.jsonl | llmctl classify runs/base --adapter runs/reward --field answer
    """
)
@options.model_argument
@click.argument("files", nargs=-1, type=options.PATH, metavar="[FILES…|-]")
@click.option("--field", default="text", show_default=True, help="The key that holds the text of JSON Lines.")
@click.option(
    "--adapter", multiple=True, metavar="DIR", help="Put this adapter beside the model's weights; repeatable."
)
@click.option("--force", is_flag=True, help="Use an adapter that was trained on another base.")
@click.option(
    "--on-long",
    type=click.Choice(["error", "truncate"]),
    default="error",
    show_default=True,
    help="What becomes of a text longer than the context.",
)
@click.option("--batch-size", type=options.INT, default=32, show_default=True, help="Texts at a time.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="To compute in; auto is the dtype of the checkpoint.",
)
@click.option("--device", help="cpu, cuda, cuda:1; by default a GPU where there is one.")
def command(model, files, field, adapter, force, on_long, batch_size, dtype, device):
    """Label, measure or rate texts with a classifier.

    MODEL is the directory of a classifier, as llmctl finetune --objective classify, regress or reward leaves it, or
    that of an adapter, which names its base. FILES hold one text in each line, or are JSON Lines with the text under
    --field, each also as .gz or .zst; without any the texts come from standard input.

    A line of the output, in the order of the texts, is a JSON object with the keys of its row, "text", "predicted" (a
    label, a list of labels, or a number) and, of labels, "probabilities". It does not depend on --batch-size.
    """
    files = list(files) or ["-"]
    if files.count("-") + (model == "-") > 1:
        raise CalledWrongly("standard input (-) can be read once only", hint="give FILES")
    if "-" in files and sys.stdin is not None and sys.stdin.isatty():
        raise CalledWrongly("no text: standard input is a terminal", hint="give FILES, or pipe text into the command")
    if batch_size < 1:
        raise CalledWrongly(f"--batch-size {batch_size}: expected at least 1")
    from llmctl.checkpoint import resolve_model
    from llmctl.classify import TextClassifier
    from llmctl.data.text_rows import read_rows

    path, dtype = resolve_model(model), None if dtype == "auto" else dtype
    how = {"batch_size": batch_size, "on_long": on_long}
    classifier = TextClassifier.open(path, dtype, device, adapter, force, **how)
    for row, said in classifier.classify(read_rows(files, field)):
        ui.print_data(json.dumps({**row.rest, "text": row.text, **said}, ensure_ascii=False))
