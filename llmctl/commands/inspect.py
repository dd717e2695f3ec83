"""`llmctl inspect`: what a checkpoint or a token stream is."""

from __future__ import annotations

import json
import os
import shutil
import sys

import click

from llmctl import options, ui
from llmctl.errors import CalledWrongly
from llmctl.pictures.settings import AttentionSettings, EmbeddingMapSettings


@options.command(
    examples="""
    llmctl inspect runs/base
    llmctl inspect runs/base --tensors --json | jq -r 'select(.kind == "tensor").name'
    llmctl inspect corpus.arrow --show 3
    cat corpus.txt | llmctl tokenize --tokenizer bytes | llmctl inspect -
    llmctl inspect runs/base --attention "the cat sat on the mat" --layer 2 --head 0 -o map.png
    llmctl inspect runs/base --embedding-map words.txt -o words.html
    """
)
@click.argument("path", metavar="X", type=options.PATH)
@click.option("--show", type=options.COUNT, default=0, help="Print this many documents of a token stream as text.")
@click.option("--tensors", is_flag=True, help="List the tensors of a checkpoint too.")
@click.option("--verify/--no-verify", default=True, help="Compare a checkpoint's files with the sha256 in its lineage.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON Lines on standard output.")
@options.settings(AttentionSettings, into="attention")
@options.settings(EmbeddingMapSettings, into="embedding")
@options.output_option(help="Write a picture (.png, .svg or .pdf, by matplotlib) or a page (.html).")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
def command(path, show, tensors, verify, as_json, attention, embedding, output, overwrite):
    """Say what X is: a checkpoint, or the tokens of a corpus.

    X is a checkpoint directory or an adapter's, a token file, a directory of its shards, or - for standard input, which may
    bring either the path of a checkpoint or a token stream.

    Of a checkpoint: family, shapes, parameters, where it comes from, and whether its files are those that were saved;
    where they are not, the exit code is 1. Of a token stream, which is read and checked whole: its splits, tokenizer
    and bytes per token. Tables go to standard error, the text of documents to standard output.

    Of a checkpoint also pictures: what the tokens of a text attend to, and where words or sentences lie. Without
    --output they are drawn in characters; with it the path is printed when the picture is complete.
    """
    from llmctl import inspection
    from llmctl.checkpoint import resolve_model

    if attention.attention is not None or embedding.embedding_map is not None:
        _show_picture(path, attention, embedding, as_json, output, overwrite)
        return
    for name in ("output", "layer", "head", "mean", "part", "target", "embeddings", "projection"):
        if options.given(name):
            raise CalledWrongly(f"--{name} is for a picture", hint="give --attention TEXT or --embedding-map FILE")
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
            ui.table(record["path"], [record["kind"], ""], list(inspection.facts(record)))
    if listed:
        ui.table("tensors", ["name", "dtype", "shape"], listed)


def _show_picture(path, attention, embedding, as_json, output, overwrite):
    from llmctl.checkpoint import resolve_model
    from llmctl.pictures import attention_map, embedding_map
    from llmctl.plotting import figure, heatmap, scatter

    if attention.attention is not None and embedding.embedding_map is not None:
        raise CalledWrongly("--attention and --embedding-map are two pictures", "give one of them")
    if path == embedding.embedding_map == "-":
        raise CalledWrongly("standard input cannot hold both the checkpoint's path and the lines of --embedding-map")
    if output:
        figure.refuse(output, overwrite)
    if attention.attention is not None:
        plot, drawn = heatmap, attention_map.attention_map(resolve_model(path), attention)
    else:
        plot, drawn = scatter, embedding_map.embedding_map(resolve_model(path), embedding.embedding_map, embedding)
    for record in plot.records(drawn) if as_json else ():
        ui.print_data(json.dumps(record, ensure_ascii=False))
    if output:
        plot.save(drawn, output, overwrite)
        ui.print_data(os.path.abspath(output))
    elif not as_json:
        ui.print_data(plot.draw(drawn, shutil.get_terminal_size((100, 24)).columns))


def _print_document(record):
    hidden = record["tokens"] - record["tokens_shown"]
    more = f", of which the last {hidden:,} are not shown" if hidden else ""
    click.echo(f"document {record['document']} ({record['split']}): {record['tokens']:,} tokens{more}", err=True)
    ui.print_data(record["text"])
