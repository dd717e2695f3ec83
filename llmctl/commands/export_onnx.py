"""`llmctl export-onnx`."""

from __future__ import annotations

from llmctl import options
from llmctl.export.onnx.settings import OnnxSettings

EXAMPLES = """
llmctl export-onnx runs/base -o runs/base-onnx
llmctl export-onnx runs/base --fuse --quantize int4 -o runs/int4 && llmctl generate runs/int4 "Once upon a time"
llmctl export-onnx runs/base --adapter runs/lora --dtype float16 --provider cuda -o runs/tuned-onnx
llmctl export-onnx runs/t5 --merged-decoder -o runs/t5-onnx
"""


@options.command(EXAMPLES)
@options.model_argument
@options.output_option(required=True, help="Directory of the exported model.")
@options.settings(OnnxSettings)
def command(model, output, settings):
    """Write a checkpoint as ONNX, which onnxruntime runs anywhere.

    The directory holds model.onnx (of an encoder-decoder encoder_model.onnx, decoder_model.onnx and
    decoder_with_past_model.onnx), config, tokenizer and genai_config.json: llmctl generate, chat, eval, embed and
    fill-mask run it, and so do onnxruntime-genai and optimum. Inputs and outputs have optimum's names.

    The work goes tensor by tensor. The result is run on a few texts beside MODEL: at several lengths, in batches, and
    continued from its cache. In float32 logits must be within 0.001 and 64 greedy tokens equal; what they disagree by
    is printed and recorded, and past --tolerance nothing is written (exit 3).
    """
    from llmctl import ui
    from llmctl.checkpoint import resolve_model
    from llmctl.export.onnx.export import export

    exported = export(resolve_model(model), output, settings)
    ui.note(f"opset {exported.opset}; {exported.checked}")
    ui.print_data(str(exported.path.absolute()))
