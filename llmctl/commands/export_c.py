"""`llmctl export-c`."""

from __future__ import annotations

from llmctl import options
from llmctl.export.c.settings import ExportCSettings

EXAMPLES = """
llmctl export-c runs/base -o story && cc -O3 -o run story/run.c -lm && ./run story/model.bin "Once upon"
llmctl export-c runs/base --type int8 -o story-int8
"""


@options.command(EXAMPLES)
@options.model_argument
@options.output_option(required=True, help="Directory of run.c and model.bin.")
@options.settings(ExportCSettings)
def command(model, output, settings):
    """Write a language model as a C program and a file: run.c and model.bin.

    Any C99 compiler makes the program; it needs the standard and the mathematical library and nothing else, and has the
    tokenizer and the sampling of `llmctl generate`: the same seed gives the same text. Where this machine has a compiler,
    the program is compiled and compared with MODEL: ids, logits, greedy tokens; past --tolerance nothing is written
    (exit 3).
    """
    from llmctl import ui
    from llmctl.checkpoint import resolve_model
    from llmctl.export.c.export import export

    done = export(resolve_model(model), output, settings)
    if done.checked.compiler is None:
        ui.note("no C compiler here (cc, gcc, clang, $CC): the result was not compared with the model")
    else:
        ui.note(f"compiled with {done.checked.compiler}; {done.checked.agreement}")
    ui.note(f"model.bin {done.nbytes / 1e6:,.1f} MB; cc -O3 -o run {output}/run.c -lm && ./run {output}/model.bin")
    ui.print_data(str(done.path.absolute()))
