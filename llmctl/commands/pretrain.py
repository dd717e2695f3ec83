"""`llmctl pretrain`."""

from __future__ import annotations

import time

import click

from llmctl import options
from llmctl.pretrain.settings import PretrainSettings

EXAMPLES = """
cat corpus.txt | llmctl tokenize --val-fraction 0.1 | llmctl pretrain --time 10m -o runs/base
llmctl pretrain corpus.arrow --params 30M --epochs 2 --seq-len 512 -o runs/30m
llmctl pretrain more.arrow --init-from runs/30m --lr 0.002 -o runs/continued
llmctl pretrain proteins.arrow --family esm --params 5M --time 20m -o runs/esm
llmctl pretrain --resume -o runs/base
torchrun --nproc-per-node 8 -m llmctl pretrain shards/ --preset tinyllama --tokens 20B -o runs/1b
"""


@options.command(EXAMPLES)
@click.argument("tokens_files", metavar="[TOKENS]...", nargs=-1, type=options.PATH)
@options.output_option(help="Directory of the run and of its checkpoint.")
@options.settings(PretrainSettings)
def command(tokens_files, output, settings):
    """Train a language model from scratch, or further, on token streams.

    TOKENS are files and shard directories that `llmctl tokenize` wrote; without any the stream is read from standard
    input. The output is a Hugging Face checkpoint, and its path is printed when it is complete. With no flags at all
    a model that suits the corpus is trained for ten minutes into runs/pretrain.

    A decoder learns to continue texts, an encoder to fill gaps, an encoder-decoder to restore what was cut out. For the
    last two the tokens need special ones: an encoder's tokenizer, or tokenize --special-tokens encoder.
    """
    from llmctl.pretrain.task import pretraining
    from llmctl.reports import show_run

    began = time.monotonic()
    given = options.given_fields(settings)
    with pretraining(settings, tokens_files, output or "runs/pretrain", given, began) as run:
        show_run(run)
