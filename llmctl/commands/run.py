"""`llmctl run`: the steps of a recipe, joined as a shell pipe would join them."""

from __future__ import annotations

import click

from llmctl import options


@options.command(
    takes_recipe=False,
    examples="""
    llmctl run recipes/quickstart.yaml
    llmctl run recipes/quickstart.yaml --dry-run
    llmctl run recipes/quickstart.yaml --set pretrain.time=10m --set pretrain.output=runs/longer
    cat corpus.txt | llmctl run my.yaml > sample.txt
    """,
)
@click.argument("recipe", metavar="RECIPE", type=options.PATH)
@click.option(
    "--set", "overrides", metavar="STEP.FLAG=VALUE", multiple=True, help="Change a flag of one step; null unsets it."
)
@click.option("--dry-run", is_flag=True, help="Print the equivalent shell line and run nothing.")
@click.pass_context
def command(ctx, recipe, overrides, dry_run):
    """Run the steps of a YAML recipe as one pipeline.

    A recipe is a list of steps, each a command with its long flags (and its arguments by their names):

    \b
      vars: {out: runs/demo}
      steps:
        - tokenize: {files: "texts/*.txt", val-fraction: 0.1}
        - pretrain: {time: 10m, output: "${out}"}
        - generate: {model: "-", prompt: "Once upon a time"}

    Each step reads the standard output of the one before it while that still runs; a step that names an earlier
    step's output waits until it is complete. The last step's standard output is the recipe's, the first step's
    standard input too. STEP is a command, a number from 1, or the `name:` written beside the command.

    `${NAME}` stands for an entry of `vars`, a directory of this Python (`${python:stdlib}`), or an environment
    variable. Wildcards in file arguments are expanded. Paths are relative to the current directory.

    A step whose inputs, flags and code are unchanged since it finished its `output` is skipped, and so are steps that
    feed only skipped steps.
    """
    from llmctl import pipeline, ui
    from llmctl.command_line import command_line
    from llmctl.recipe import load_steps

    steps = load_steps(recipe, overrides)
    program = ctx.parent.command
    lines = [command_line(step, program, ctx.parent, f"{recipe}: step {i}") for i, step in enumerate(steps, start=1)]
    stages = pipeline.plan(lines)
    if dry_run:
        ui.print_data(pipeline.shell_line(stages))
        return
    messages = {f"LLMCTL_{name.upper()}": "1" for name in ("quiet", "debug") if ctx.meta.get(f"llmctl.{name}")}
    pipeline.run(stages, messages)
