"""`llmctl fill-mask`: the likeliest tokens at the gaps of a text."""

from __future__ import annotations

import json
import sys

import click

from llmctl import options, ui
from llmctl.errors import CalledWrongly


@options.command(
    examples="""
    llmctl fill-mask runs/encoder "The <mask> sat on the mat."
    llmctl fill-mask runs/encoder "To <mask> or not to <mask>" --top-k 3 --jsonl
    llmctl fill-mask runs/encoder --jsonl < sentences.txt | jq -r .masks[0][0].token
    cat gaps.jsonl | llmctl fill-mask runs/encoder - --field sentence --jsonl > filled.jsonl
    """
)
@options.model_argument
@click.argument("text", required=False)
@click.option("--top-k", type=options.INT, default=5, show_default=True, help="How many tokens for each mask.")
@click.option("--jsonl", is_flag=True, help="Print a JSON object for each text.")
@click.option("--field", default="text", show_default=True, help="The key that holds the text of JSON Lines.")
@click.option("--batch-size", type=options.INT, default=32, show_default=True, help="Texts at a time.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="To compute in; auto is the dtype of the checkpoint.",
)
@click.option("--device", help="cpu, cuda, cuda:1; by default a GPU where there is one.")
def command(model, text, top_k, jsonl, field, batch_size, dtype, device):
    """Say which tokens may stand where a text has a mask.

    MODEL is the checkpoint directory of an encoder. TEXT has the tokenizer's mask token, such as [MASK] or <mask>, for
    each missing token. With - or none at all, texts come from standard input: one in each line, or JSON Lines.

    Each line of the output is a probability and a token; several masks, and texts, are separated by an empty line. A
    line of --jsonl has the keys of its row, "text", and "masks": for each mask a list of "token", "id" and "probability".
    """
    from llmctl.checkpoint import resolve_model
    from llmctl.data.text_rows import TextRow, read_rows
    from llmctl.fill_mask import MaskFiller

    for name, value in (("--top-k", top_k), ("--batch-size", batch_size)):
        if value < 1:
            raise CalledWrongly(f"{name} {value}: expected at least 1")
    if text is None or text == "-":
        _check_standard_input(model)
        rows = read_rows(["-"], field)
    else:
        rows = [TextRow(text, "the text", {})]
    filler = MaskFiller.open(resolve_model(model), None if dtype == "auto" else dtype, device)
    is_first = True
    for filled in filler.fill(rows, top_k, batch_size):
        if jsonl:
            ui.print_data(_json_line(filled))
            continue
        for candidates in filled.masks:
            if not is_first:
                ui.print_data("")
            is_first = False
            for candidate in candidates:
                ui.print_data(f"{candidate.probability:.4f}  {candidate.token}")


def _json_line(filled):
    masks = [[{**vars(candidate)} for candidate in candidates] for candidates in filled.masks]
    return json.dumps({**filled.row.rest, "text": filled.row.text, "masks": masks}, ensure_ascii=False)


def _check_standard_input(model):
    if model == "-":
        raise CalledWrongly("standard input holds the path of MODEL, so it cannot hold the text", hint="give TEXT")
    if sys.stdin is not None and sys.stdin.isatty():
        raise CalledWrongly("no text", hint="give it as an argument, or pipe lines into the command")
