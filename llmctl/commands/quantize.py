"""`llmctl quantize`."""

from __future__ import annotations

from llmctl import options
from llmctl.quantize.settings import QuantizeSettings

EXAMPLES = """
llmctl quantize runs/base --method gptq --calibration corpus.txt -o runs/int4
llmctl quantize runs/base --format int8 -o runs/int8
llmctl quantize runs/base --format nf4 -o runs/nf4
llmctl tokenize corpus.txt --tokenizer runs/base | llmctl quantize runs/base --method awq --calibration - -o runs/awq
llmctl quantize runs/base --target-bits 5 --keep lm_head,layers.0.mlp.down_proj --calibration corpus.txt -o runs/mixed
llmctl quantize runs/int4 --format bfloat16 -o runs/plain
"""


@options.command(EXAMPLES)
@options.model_argument
@options.output_option(required=True, help="Directory of the quantized checkpoint.")
@options.settings(QuantizeSettings)
def command(model, output, settings):
    """Store the matrices of a checkpoint in 8 or 4 bits, or take that back.

    The result is a checkpoint like any other, for every command here and for the programs that --format names. It is run
    beside MODEL on text that calibration did not see, by its weights alone and, where kernels here round what they multiply,
    as those run it; what they differ by is printed and recorded, and past --tolerance nothing is written (exit 3). Work
    goes matrix by matrix, for gptq and awq layer by layer, in the memory of a few of them. GPTQ and AWQ checkpoints of other programs can be MODEL too.
    """
    from llmctl import ui
    from llmctl.checkpoint import resolve_model
    from llmctl.errors import CalledWrongly
    from llmctl.quantities import format_size
    from llmctl.quantize.run import quantize

    if model == settings.calibration == "-":
        raise CalledWrongly("standard input cannot bring both the checkpoint's path and the calibration text")
    with ui.progress("quantize") as bar:
        found = quantize(
            resolve_model(model),
            output,
            settings,
            options.resolved_flags(),
            lambda what, done, total: bar.update(done, f"{what} {done}/{total}"),
            options.typed_fields(settings),
        )
    columns = {"after": found.agreement} | ({} if found.running is None else {"after, run here": found.running})
    rows = [
        ["weights", format_size(found.bytes_before), *[format_size(found.bytes_after)] * len(columns)],
        [
            "perplexity",
            f"{found.agreement.perplexity_before:.5g}",
            *(f"{a.perplexity_after:.5g}" for a in columns.values()),
        ],
        ["KL divergence, nats", "", *(f"{a.kl_divergence:.4g}" for a in columns.values())],
        ["same first choice", "", *(f"{a.top1_agreement:.1%}" for a in columns.values())],
    ]
    bits = "" if found.bits_per_weight is None else f", {found.bits_per_weight:.3g} bits per weight"
    ui.table(f"{found.modules} matrices{bits}", ["", "before", *columns], rows)
    for remark in found.remarks:
        ui.note(remark)
    ui.print_data(str(found.path.absolute()))
