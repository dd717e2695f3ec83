"""`llmctl inspect`: what a checkpoint or a token stream is."""

from __future__ import annotations

import json
import sys

import click

from llmctl import options, ui
from llmctl.quantities import format_count, format_size


@options.command(
    examples="""
    llmctl inspect runs/base
    llmctl inspect runs/base --tensors --json | jq -r 'select(.kind == "tensor").name'
    llmctl inspect corpus.arrow --show 3
    cat corpus.txt | llmctl tokenize --tokenizer bytes | llmctl inspect -
    """
)
@click.argument("path", metavar="X", type=options.PATH)
@click.option("--show", type=options.COUNT, default=0, help="Print this many documents of a token stream as text.")
@click.option("--tensors", is_flag=True, help="List the tensors of a checkpoint too.")
@click.option("--verify/--no-verify", default=True, help="Compare a checkpoint's files with the sha256 in its lineage.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON Lines on standard output.")
def command(path, show, tensors, verify, as_json):
    """Say what X is: a checkpoint, or the tokens of a corpus.

    X is a checkpoint directory, a token file, a directory of its shards, or - for standard input, which may bring
    either the path of a checkpoint or a token stream.

    Of a checkpoint: family, shapes, parameters, where it comes from, and whether its files are those that were saved;
    where they are not, the exit code is 1. Of a token stream, which is read and checked whole: its splits, tokenizer
    and bytes per token. Tables go to standard error, the text of documents to standard output.
    """
    from llmctl import inspection
    from llmctl.checkpoint import resolve_model

    if path == "-" and inspection.begins_token_stream(sys.stdin.buffer):
        records = inspection.inspect_pipe(sys.stdin.buffer, show)
    else:
        records = inspection.inspect(resolve_model(path) if path == "-" else path, n_documents=show, check_files=verify)
    listed = []
    for record in records:
        if record["kind"] == "tensor" and not tensors:
            continue
        if as_json:
            ui.print_data(json.dumps(record, ensure_ascii=False))
        elif record["kind"] == "tensor":
            listed.append([record["name"], record["dtype"], " x ".join(map(str, record["shape"]))])
        elif record["kind"] == "document":
            _print_document(record)
        else:
            ui.table(record["path"], [record["kind"], ""], list(_facts(record)))
    if listed:
        ui.table("tensors", ["name", "dtype", "shape"], listed)


def _print_document(record):
    hidden = record["tokens"] - record["tokens_shown"]
    more = f", of which the last {hidden:,} are not shown" if hidden else ""
    click.echo(f"document {record['document']} ({record['split']}): {record['tokens']:,} tokens{more}", err=True)
    ui.print_data(record["text"])


def _facts(record, prefix=""):
    """Rows of a table for a person: one per value, however deep it lies."""
    for key, value in record.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _facts(value, f"{name}: ")
        elif key not in ("kind", "path") and value not in (None, [], ()):
            yield [name, _in_words(key, value)]


def _in_words(key, value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in ("parameters", "active_parameters"):
        return f"{value:,} ({format_count(value)})"
    if key == "bytes":
        return f"{value:,} ({format_size(value)})"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not key.endswith(("seed", "id")) else value
