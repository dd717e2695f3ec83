"""`llmctl arena`: which of two models people prefer."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys

import click

from llmctl import options, ui
from llmctl.arena.settings import ArenaSettings
from llmctl.errors import CalledWrongly
from llmctl.generation.settings import Sampling


@options.command(
    examples="""
    llmctl arena runs/sft runs/dpo --prompts questions.txt
    llmctl arena runs/sft runs/dpo --prompts questions.jsonl --temperature 0 < votes.txt
    llmctl arena --table
    """
)
@click.argument("models", nargs=-1, type=options.PATH, metavar="[A B]")
@options.settings(ArenaSettings, into="arena")
@options.settings(Sampling, into="sampling")
def command(models, arena, sampling):
    """Compare two models blind, and rate models by all votes.

    A and B answer every question side by side in an order of chance; your vote is 1, 2, tie or "both bad", and is kept.
    Without a terminal the votes are lines of standard input. --table gives Elo ratings of all models in --votes by
    Bradley and Terry's model, with intervals that hold 95 % of the bootstrap's resamplings.
    """
    if arena.table:
        _print_table(arena)
        return
    if len(models) != 2 or arena.prompts is None:
        raise CalledWrongly("expected two models and --prompts FILE, or --table")
    if os.path.abspath(models[0]) == os.path.abspath(models[1]):
        raise CalledWrongly(f"{models[0]} and {models[1]} are one model, which nobody can prefer to itself")
    from llmctl.arena.blind import pair, read_prompts
    from llmctl.arena.votes import append
    from llmctl.chat.engine import Engine

    if sampling.seed is None:
        sampling = dataclasses.replace(sampling, seed=int.from_bytes(os.urandom(4), "little"))
    prompts = list(read_prompts(arena.prompts))
    engines = [Engine.open(model, arena) for model in models]
    order, n_votes = random.Random(sampling.seed), 0
    for number, messages in enumerate(prompts):
        shown = pair(engines, messages, sampling, order, number)
        said = _vote(shown, f"{number + 1} of {len(prompts)}")
        if said is None:
            break
        append(arena.votes, shown.messages, shown.models, shown.answers, said)
        n_votes += 1
    ui.note(
        f"{n_votes} of {len(prompts)} questions have a vote in {arena.votes}; llmctl arena --table rates the models"
    )


def _vote(shown, where):
    """One of the choices; None at the end of the input."""
    from llmctl.arena.votes import CHOICES

    asks = sys.stdin.isatty() and ui.is_terminal()
    if asks:
        ui.message(f"\n--- {where}: {shown.messages[-1]['content']}")
        for number, answer in enumerate(shown.answers, 1):
            ui.message(f"--- answer {number}\n{answer}")
    while True:
        if asks:
            click.echo(f"better: {', '.join(CHOICES)}? ", err=True, nl=False)
        line = sys.stdin.readline()
        if not line:
            return None
        said = line.strip().casefold()
        found = [choice for choice in CHOICES if said and choice.startswith(said)]
        if found:
            return found[0]
        if not asks:
            raise CalledWrongly(f"standard input: the vote is {line.strip()!r}; expected one of {', '.join(CHOICES)}")


def _print_table(arena):
    from llmctl.arena.rating import rate
    from llmctl.arena.votes import read

    ratings = rate(read(arena.votes), arena.bootstrap)
    rows = [[r.model, f"{r.rating:.0f}", f"{r.low:.0f} to {r.high:.0f}", r.votes, f"{r.wins:g}"] for r in ratings]
    ui.table("ratings", ["model", "Elo", "95 %", "votes", "wins"], rows)
    for rating in ratings:
        ui.print_data(json.dumps({**dataclasses.asdict(rating), "rating": round(rating.rating, 2)}))
