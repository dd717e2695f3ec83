"""`llmctl merge-lora`."""

from __future__ import annotations

import click

from llmctl import options
from llmctl.finetune.merge_settings import MergeSettings

EXAMPLES = """
llmctl merge-lora runs/base runs/lora -o runs/merged
llmctl merge-lora runs/base runs/code runs/math --weights 0.6,0.4 --method ties -o runs/both
llmctl merge-lora runs/merged runs/lora --unmerge -o runs/base-again
llmctl finetune runs/base chats.jsonl -o runs/lora | llmctl merge-lora runs/base - -o runs/merged
"""


@options.command(EXAMPLES)
@options.model_argument
@click.argument("adapters", nargs=-1, required=True, type=options.PATH)
@options.output_option(required=True, help="Directory of the merged checkpoint.")
@options.settings(MergeSettings)
def command(model, adapters, output, settings):
    """Fold adapters (LoRA and its relatives, IA3) into the weights of their base.

    ADAPTERS are PEFT directories, - reads the path of one from standard input. The work goes tensor by tensor, in
    float32 and back to the base's dtype, in the memory of a few matrices. The result is run beside base and adapters
    on a few texts; what they disagree by is printed and recorded, and past --tolerance nothing is written (exit 3).
    """
    from llmctl import ui
    from llmctl.checkpoint import resolve_model
    from llmctl.finetune.merge import merge

    merged = merge(resolve_model(model), [resolve_model(path) for path in adapters], output, settings)
    ui.note(f"{merged.changed} tensors changed; {merged.agreement}")
    ui.print_data(str(merged.path.absolute()))
