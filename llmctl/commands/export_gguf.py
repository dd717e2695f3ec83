"""`llmctl export-gguf`."""

from __future__ import annotations

from llmctl import options
from llmctl.export.gguf.settings import ExportGgufSettings

EXAMPLES = """
llmctl export-gguf runs/base --type q4_k -o base.gguf
llmctl generate base.gguf "Once upon a time"
"""


@options.command(EXAMPLES)
@options.model_argument
@options.output_option(required=True, help="The file to write, which ends in .gguf.")
@options.settings(ExportGgufSettings)
def command(model, output, settings):
    """Write a language model as a GGUF file, for llama.cpp, ollama and their like.

    The file holds the weights, the tokenizer and the chat template. It is written tensor by tensor, read back, and
    compared with MODEL: past --tolerance nothing is left (exit 3). A model, or a part of its tokenizer, that llama.cpp
    would compute otherwise is refused by name.
    """
    from llmctl import ui
    from llmctl.checkpoint import resolve_model
    from llmctl.export.gguf.export import export

    done = export(resolve_model(model), output, settings)
    ui.note(f"{done.nbytes / 1e6:,.1f} MB; {done.agreement}")
    ui.print_data(str(done.path.absolute()))
