"""Where a flag's value comes from beside the command line: the environment, and a recipe."""

from __future__ import annotations

import os

import click

from llmctl.errors import CalledWrongly, did_you_mean


def flag_names(command: click.Command) -> dict[str, str]:
    """Long flag and argument names, as a recipe writes them, to parameter names."""
    names = {}
    for param in command.params:
        for opt in param.opts:
            if opt.startswith("--") or isinstance(param, click.Argument):
                names[opt.lstrip("-").replace("_", "-")] = param.name
    return names


def bind_environment(command: click.Command) -> None:
    """Let LLMCTL_<COMMAND>_<FLAG> set each flag, under any of its long names."""
    for param in command.params:
        if isinstance(param, click.Option):
            param.envvar = [variable(command.name, opt) for opt in param.opts if opt.startswith("--")]


def refuse_unknown_variables(ctx: click.Context) -> None:
    """A misspelt variable must not pass for a default."""
    prefix = variable(ctx.command.name, "")
    commands = [variable(name, "") for name in ctx.parent.command.list_commands(ctx)] if ctx.parent else []
    of_others = tuple(other for other in commands if other != prefix and other.startswith(prefix))
    known = [name for param in ctx.command.params for name in param.envvar or ()]
    for name in os.environ:
        if name.startswith(prefix) and name not in known and not name.startswith(of_others):
            endings = [other.removeprefix(prefix) for other in known]
            hint = did_you_mean(name.removeprefix(prefix), endings) or f"unset it, or see {ctx.command_path} --help"
            raise CalledWrongly(f"the environment sets {name}, which is no flag of {ctx.command.name}", hint=hint)


def variable(command: str, flag: str) -> str:
    """The environment's name of a command's flag."""
    return f"LLMCTL_{command}_{flag.lstrip('-')}".replace("-", "_").upper()


def read_recipe(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """The callback of --recipe: what the file says becomes the defaults of the flags."""
    if path is None:
        return
    from llmctl.recipe import checked_keys, load_mapping

    names = flag_names(ctx.command)
    for common in ("recipe", "quiet", "debug"):
        names.pop(common, None)
    values = checked_keys(load_mapping(path), names, path)
    params = {param.name: param for param in ctx.command.params}
    ctx.default_map = {names[key]: _one_or_many(params[names[key]], value, path) for key, value in values.items()}
    ctx.meta["llmctl.recipe"] = path


def _one_or_many(param: click.Parameter, value, where: str):
    """A recipe may write one value of a flag that takes several as it is, and no list for one that takes one."""
    takes_many = param.nargs == -1 or getattr(param, "multiple", False)
    if isinstance(value, list) and not takes_many:
        raise CalledWrongly(f"{where}: '{param.name}' expects one value, got {len(value)}")
    return [value] if takes_many and not isinstance(value, list) else value
