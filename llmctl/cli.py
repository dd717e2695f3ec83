"""The `llmctl` program: finds a command, runs it, and turns whatever goes wrong into one clear line and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import click

from llmctl import __version__, commands, ui
from llmctl.errors import did_you_mean
from llmctl.failures import exit_code_of
from llmctl.flag_sources import bind_environment

COMPLETE_VARIABLE = "_LLMCTL_COMPLETE"


class Program(click.Group):
    """The commands are the modules of `llmctl.commands`, each imported only when it is wanted."""

    def list_commands(self, ctx):
        folders = commands.__path__
        names = [name for folder in folders for name in os.listdir(folder) if name.endswith(".py") and name[0] != "_"]
        return sorted(name.removesuffix(".py").replace("_", "-") for name in names)

    def get_command(self, ctx, cmd_name):
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"llmctl.commands.{cmd_name.replace('-', '_')}").command
        command.name = cmd_name
        bind_environment(command)
        return command

    def resolve_command(self, ctx, args):
        name = ctx.token_normalize_func(args[0])
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            error = click.UsageError(f"no such command: {args[0]}", ctx)
            error.hint = did_you_mean(name, known) or "llmctl --help lists the commands"
            raise error
        return super().resolve_command(ctx, args)


@click.command(
    cls=Program,
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "LLMCTL",
        "max_content_width": 100,
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.option("--quiet", is_flag=True, help="No notes and no progress, only warnings.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, "--version", "-V", message="llmctl %(version)s")
@click.pass_context
def program(ctx, quiet, debug):
    """The whole life of a language model, in commands that compose.

    Standard output is data for the next command, standard error is for people. `llmctl COMMAND --help` explains a
    command with examples.
    """
    ctx.meta["llmctl.quiet"] = quiet
    ctx.meta["llmctl.debug"] = debug


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # Threads that wait for each other by spinning slow training down many times over when a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not ui.is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    elif sys.stdout is not None:
        # Data is UTF-8 whatever the locale says, and a path keeps its bytes.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    if COMPLETE_VARIABLE in os.environ:
        return _complete(argv)
    ctx = None
    try:
        _print_notices()
        with program.make_context("llmctl", list(argv)) as ctx:
            program.invoke(ctx)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every failure becomes a line and an exit code
        return exit_code_of(error, ctx)


class _Notices(logging.Handler):
    """What the library has to say, for a person."""

    def emit(self, record):
        if record.levelno >= logging.WARNING and ui.is_main_process():
            ui.message(f"warning: {record.getMessage()}")
        elif record.levelno == logging.INFO:
            ui.note(record.getMessage())


def _print_notices() -> None:
    logger = logging.getLogger("llmctl")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Notices())
    logger.propagate = False


def _complete(words: list[str]) -> int:
    """Answer the shell as `completion_scripts` describes."""
    from click.shell_completion import ShellComplete

    *before, current = words or [""]
    before = [word for word in before if word != "="]  # bash makes three words of --flag=value
    for item in ShellComplete(program, {}, "llmctl", COMPLETE_VARIABLE).get_completions(before, current):
        click.echo(f"{item.type}\t{item.value}\t{item.help or ''}")
    return 0
