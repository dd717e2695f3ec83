"""`llmctl inspect-data`: what fine-tuning would learn from rows."""

from __future__ import annotations

import json
import os
import sys

import click

from llmctl import options, ui
from llmctl.errors import CalledWrongly
from llmctl.finetune.data.settings import FormSettings

_BAR = 40
_IN_WORDS = {
    "bad": "rows that cannot be used",
    "untrained": "without a learned token",
    "long": "longer than the limit",
    "ties": "an answer preferred to itself",
    "torn": "a token across prompt and answer",
    "learned": "learned tokens",
    "limit": "limit (--seq-len)",
}


@options.command(
    examples="""
    llmctl inspect-data chats.jsonl --model runs/base
    llmctl inspect-data questions.csv --columns prompt=question,completion=answer --model runs/base --show 1
    llmctl inspect-data chats.jsonl --model runs/base --show 0 --json | jq '.lengths.longest'
    """
)
@click.argument("files", nargs=-1, type=options.PATH, metavar="[DATA…|-]")
@click.option("--model", type=options.PATH, required=True, metavar="MODEL", help="The checkpoint, or its tokenizer.")
@options.settings(FormSettings)
@click.option("--show", type=options.COUNT, default=3, help="Print this many examples.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON Lines on standard output.")
def command(files, model, settings, show, as_json):
    """Show what fine-tuning would learn from rows of data.

    DATA is JSON Lines, a JSON array, CSV, TSV, parquet or a token stream, each also compressed. The first examples are
    printed as the model would read them: what is learned is in colour on a terminal, else between ⟦ and ⟧. Counts,
    lengths, duplicates and rows that training would refuse follow on standard error.
    """
    files = list(files) or ["-"]
    if "-" in files and (model == "-" or (sys.stdin is not None and sys.stdin.isatty())):
        raise CalledWrongly("no data on standard input", hint="give DATA, or pipe rows into the command")
    from llmctl.checkpoint import resolve_model
    from llmctl.finetune.data.inspection import inspect_data
    from llmctl.finetune.data.sources import parse_sources
    from llmctl.tokenizer import Tokenizer

    model = str(resolve_model(model)) if model == "-" else model
    records = inspect_data(parse_sources(files), settings, Tokenizer.load(model), _limit(settings, model), show)
    for record in records:
        if as_json:
            ui.print_data(json.dumps(record, ensure_ascii=False))
        elif record["kind"] == "example":
            _print_example(record)
        else:
            _print_summary(record)


def _limit(settings, model):
    """The longest row that training would take, where the model says it."""
    if settings.seq_len or not os.path.exists(os.path.join(model, "config.json")):
        return settings.seq_len
    from llmctl.finetune.data.prepare import default_seq_len
    from llmctl.models.loading import read_config

    return default_seq_len(read_config(model).max_positions)


def _print_example(record):
    names = ["chosen", "rejected"] if record["form"] == "chosen + rejected" else ["source", "target"]
    label = "" if record["label"] is None else f", label {record['label']}"
    for name, sequence in zip(names, record["sequences"]):
        which = f", {name}" if len(record["sequences"]) > 1 else ""
        n_learned = f"{len(sequence['ids'])} tokens, {sum(sequence['learned'])} of them learned"
        ui.print_data(f"--- {record['place']} ({record['form']}{which}{label}): {n_learned}")
        ui.print_data("".join(_painted(text) if is_learned else text for text, is_learned in sequence["pieces"]))
        ui.print_data("ids: " + " ".join(map(str, sequence["ids"])))


def _painted(text):
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, fg="green") if is_coloured else f"⟦{text}⟧"


def _print_summary(record):
    lengths = record["lengths"]
    of_lengths = {f"{name} example": lengths[name] for name in ("shortest", "median", "longest") if name in lengths}
    facts = [(key, value) for key, value in {**record, **of_lengths}.items() if isinstance(value, (int, float, str))]
    ui.table("data", ["", ""], [[_IN_WORDS.get(key, key), value] for key, value in facts if key != "kind"])
    most = max([n for _, _, n in lengths["histogram"]], default=1)
    bars = [[f"{a}-{b}", n, "█" * -(-n * _BAR // most)] for a, b, n in lengths["histogram"]]
    ui.table("tokens per example", ["tokens", "examples", ""], bars)
    for name, values in (("forms", record["forms"]), ("labels", record["labels"])):
        if values:
            ui.table(name, [name[:-1], "number"], [list(pair) for pair in values.items()])
    for problem in record["problems"]:
        ui.note(problem)
