"""A command's flags, gathered from a recipe and the environment, as the command line that would set them."""

from __future__ import annotations

import glob
import os
import re
import shlex

import click

from llmctl.errors import CalledWrongly, UserError, did_you_mean
from llmctl.flag_sources import flag_names
from llmctl.pipeline import CommandLine
from llmctl.recipe import Step, checked_keys

_WILDCARD = re.compile(r"[*?\[]")


def command_line(step: Step, program: click.Group, parent: click.Context, where: str) -> CommandLine:
    """Type and check a recipe's step now, so that the third step's typing error does not wait for the first two."""
    command = program.get_command(parent, step.command)
    if command is None:
        hint = did_you_mean(step.command, program.list_commands(parent)) or "llmctl --help lists the commands"
        raise CalledWrongly(f"{where}: no such command: {step.command}", hint=hint)
    names = flag_names(command)
    given = checked_keys(step.flags, names, where)
    values = {names[key]: value for key, value in given.items()}
    values |= _environment(command, parent, kept={names[key] for key in step.overridden & given.keys()})
    line = CommandLine(step.name, [step.command], f"llmctl {step.command}")
    for param in sorted(command.params, key=lambda param: isinstance(param, click.Argument)):
        if param.name in values:
            _add(line, param, values[param.name], where)
        elif isinstance(param, click.Argument) and isinstance(param.type, click.Path):
            line.reads_stdin = True
    command.make_context(step.command, line.arguments[1:], parent=parent).close()
    return line


def _environment(command: click.Command, parent: click.Context, kept: set[str]) -> dict[str, object]:
    """What the environment sets, by parameter name, save for those to be kept as they are."""
    ctx = command.context_class(command, parent=parent, info_name=command.name)
    found = {param.name: param.value_from_envvar(ctx) for param in command.params if param.name not in kept}
    return {name: value for name, value in found.items() if value is not None}


def _add(line: CommandLine, param: click.Parameter, value, where: str) -> None:
    texts = [value] if isinstance(value, str) else list(value)
    if len(texts) > 1 and not (param.multiple or param.nargs == -1):
        raise CalledWrongly(f"{where}: '{param.name}' expects one value, got {len(texts)}")
    if isinstance(param, click.Argument):
        _add_argument(line, param, texts)
    else:
        for text in texts:
            line.arguments += (words := _option_words(param, text, where))
            line.shell += "".join(f" {shlex.quote(word)}" for word in words)
    if isinstance(param.type, click.Path):
        _add_paths(line, param, texts)


def _add_argument(line: CommandLine, param: click.Argument, texts: list[str]) -> None:
    expanded = [path for text in texts for path in _expand(param, text)]
    if any(text.startswith("-") and text != "-" for text in expanded):
        line.arguments.append("--")
        line.shell += " --"
    line.arguments += expanded
    for text in texts:
        line.shell += " " + (_quote_pattern(text) if _is_pattern(param, text) else shlex.quote(text))


def _option_words(param: click.Option, text: str, where: str) -> list[str]:
    flag = max(param.opts, key=len)
    if not param.is_flag:
        return [f"{flag}={text}"] if text.startswith("-") and text != "-" else [flag, text]
    try:
        is_on = click.BOOL.convert(text, param, None)
    except click.BadParameter:
        raise CalledWrongly(f"{where}: {flag}: expected on or off, got '{text}'") from None
    return [flag] if is_on else param.secondary_opts[:1]


def _add_paths(line: CommandLine, param: click.Parameter, texts: list[str]) -> None:
    if not param.type.writable:
        line.inputs += [path for text in texts for path in _expand(param, text)]
        line.reads_stdin |= "-" in texts
        return
    line.outputs += texts
    if param.name == "output":
        line.main_output = texts[0]


def _is_pattern(param: click.Parameter, text: str) -> bool:
    is_file = isinstance(param, click.Argument) and isinstance(param.type, click.Path)
    return is_file and bool(_WILDCARD.search(text)) and not os.path.exists(text)


def _expand(param: click.Parameter, text: str) -> list[str]:
    """The files that a pattern stands for, as a shell would name them; any other text as it is."""
    if not _is_pattern(param, text):
        return [text]
    paths = sorted(glob.glob(text))
    if not paths:
        raise UserError(f"{text}: no file matches")
    return paths


def _quote_pattern(pattern: str) -> str:
    """Quote all but the wildcards, which the shell is to expand as we do."""
    pieces = re.split(r"([*?\[\]]+)", pattern)
    return "".join(piece if i % 2 else shlex.quote(piece) if piece else "" for i, piece in enumerate(pieces))
