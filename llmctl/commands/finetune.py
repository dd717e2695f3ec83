"""`llmctl finetune`."""

from __future__ import annotations

import time

import click

from llmctl import options
from llmctl.finetune.settings import FinetuneSettings

EXAMPLES = """
llmctl finetune runs/base chats.jsonl -o runs/lora
llmctl finetune runs/base chats.jsonl --method full --epochs 2 -o runs/tuned
llmctl finetune runs/base code.jsonl:0.7 chats.jsonl:0.3 --targets all-linear --lora-rank 32 -o runs/mixed
llmctl finetune runs/tuned preferences.jsonl --objective dpo -o runs/dpo
llmctl finetune --resume -o runs/lora
"""


@options.command(EXAMPLES)
@click.argument("model", required=False)
@click.argument("data", nargs=-1)
@options.output_option(help="Directory of the run and of its adapter or checkpoint.")
@options.settings(FinetuneSettings)
def command(model, data, output, settings):
    """Teach a checkpoint from conversations, instructions, texts or preferences.

    MODEL is a checkpoint directory, DATA are files of rows (JSON Lines, JSON, CSV, TSV, Parquet, or token streams), each
    with a weight behind a colon where they are mixed; - reads standard input. The form of the rows is recognized by
    their keys. The method says what is trained, the objective what is asked of it. The output is a PEFT adapter, or
    with --method full or freeze a whole checkpoint; its path is printed when it is complete.
    """
    from llmctl.checkpoint import resolve_model
    from llmctl.finetune.task import finetuning
    from llmctl.reports import show_run

    began = time.monotonic()
    base = None if model is None else resolve_model(model)
    with finetuning(settings, base, data, output or "runs/finetune", options.given_fields(settings), began) as run:
        show_run(run)
