"""`llmctl completions`: what a shell needs to complete commands, flags, choices and paths."""

from __future__ import annotations

import click

from llmctl import options, ui
from llmctl.completion_scripts import SCRIPTS


@options.command(
    examples="""
    source <(llmctl completions bash)
    llmctl completions zsh > ~/.zfunc/_llmctl
    llmctl completions fish > ~/.config/fish/completions/llmctl.fish
    """
)
@click.argument("shell", type=click.Choice(tuple(SCRIPTS)))
def command(shell):
    """Print the completion script of a shell.

    Source it from the shell's start-up file, or put it where the shell looks for completions.
    """
    _, script = SCRIPTS[shell]
    ui.print_data(script, end="")
