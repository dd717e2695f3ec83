"""`llmctl index`: documents that a chat can look things up in."""

from __future__ import annotations

import dataclasses
import json

import click

from llmctl import options, ui
from llmctl.retrieval.settings import IndexSettings


@options.command(
    examples="""
    llmctl index notes
    llmctl index notes --embed-model runs/encoder
    llmctl index notes --query "Who wrote the report?" | jq -r .source
    """
)
@click.argument("directory", metavar="DIR", type=options.PATH)
@options.settings(IndexSettings)
def command(directory, settings):
    """Index the text files of a directory for chat --docs.

    The index is one file in DIR, .llmctl-index. Called again, it reads only the files that have changed. Files that
    are no UTF-8 text and hidden ones are left out.
    """
    from llmctl.retrieval.index import Index, update

    with ui.progress("index", unit="passages") as bar:
        length = settings.passage_length
        changes = update(directory, settings.embed_model, settings.rebuild, length, bar.update)
    said = ", ".join(f"{count} {name}" for name, count in dataclasses.asdict(changes).items() if name != "passages")
    ui.note(f"{directory}: {changes.passages} passages; files: {said}")
    if settings.query is not None:
        for passage in Index.open(directory, settings.embed_model).search(settings.query, settings.passages):
            ui.print_data(json.dumps({"source": passage.source, **dataclasses.asdict(passage)}, ensure_ascii=False))
