"""What the program says when something goes wrong: one or two lines on standard error, and the exit code."""

from __future__ import annotations

import errno
import os
import re
import select
import sys

import click

from llmctl.errors import Interrupted, UserError, did_you_mean
from llmctl.quantities import format_size

# Flags that lower the memory a command needs, the most effective first.
_MEMORY_FLAGS = ("micro_batch_size", "batch_size", "seq_len", "dtype", "activation_checkpointing", "workers")


def exit_code_of(error: BaseException, ctx: click.Context | None) -> int:
    """Report an exception that ended a command and return the exit code that belongs to it."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE and _stdout_reader_is_gone():
        _discard_stdout()
        return 0
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    message, hint, code, is_expected = _explain(error, ctx)
    if ctx is not None and ctx.meta.get("llmctl.debug"):
        import traceback

        traceback.print_exception(error)
    elif not is_expected:
        hint = "this is a defect of llmctl; --debug shows where it happened"
    _print(message, hint, code)
    if isinstance(error, OSError):
        _discard_stdout()
    return code


def _explain(error, ctx) -> tuple[str, str | None, int, bool]:
    """The message, the hint, the exit code, and whether it is a failure that we foresaw."""
    if isinstance(error, UserError):
        return f"error: {error.message}", error.hint, error.exit_code, True
    if isinstance(error, Interrupted):
        return str(error), None, error.exit_code, True
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted", None, 130, True
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.format_message(), None, 2, True
    if isinstance(error, click.ClickException):
        return f"error: {_sentence(error)}", _usage_hint(error), error.exit_code, True
    if _is_out_of_memory(error):
        return f"error: out of memory{_wanted(error)}", _memory_hint(ctx), 1, True
    if isinstance(error, OSError):
        return f"error: {_describe_os_error(error)}", None, 1, True
    return f"error: unexpected {type(error).__name__}: {_first_line(error)}", None, 1, False


def _sentence(error: click.ClickException) -> str:
    """click's message in our manner, with the source of a value that did not come from the command line."""
    if isinstance(error, click.NoSuchOption):
        return f"no such option: {error.option_name}"
    ctx, param = getattr(error, "ctx", None), getattr(error, "param", None)
    if isinstance(error, click.BadParameter) and ctx is not None and param is not None:
        name = max(param.opts, key=len) if isinstance(param, click.Option) else param.make_metavar(ctx)
        if isinstance(error, click.MissingParameter):
            return f"missing {param.param_type_name}: {name}"
        return f"{_source(ctx, param)}{name}: {error.message.rstrip('.')}"
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


def _source(ctx: click.Context, param: click.Parameter) -> str:
    source = ctx.get_parameter_source(param.name)
    if source is click.core.ParameterSource.DEFAULT_MAP:
        return f"{ctx.meta['llmctl.recipe']}: "
    if source is click.core.ParameterSource.ENVIRONMENT:
        return f"{next(variable for variable in param.envvar if os.environ.get(variable))}: "
    return ""


def _usage_hint(error: click.ClickException) -> str | None:
    if hasattr(error, "hint"):
        return error.hint
    ctx = getattr(error, "ctx", None)
    if ctx is None:
        return None
    if isinstance(error, click.NoSuchOption):
        known = [opt for param in ctx.command.get_params(ctx) for opt in param.opts + param.secondary_opts]
        suggestion = did_you_mean(error.option_name, [opt for opt in known if opt.startswith("--")])
        if suggestion:
            return suggestion
    return f"{ctx.command_path} --help lists its flags"


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's own error types are recognized by name: importing torch to name them would cost a second.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _wanted(error: BaseException) -> str:
    """How much the allocation asked for that failed, in the words of torch or numpy."""
    found = re.search(r"to allocate ([\d.]+) (\w+)", str(error))
    if found is None:
        return ""
    amount = format_size(int(found[1])) if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f": {amount} more were needed"


def _memory_hint(ctx: click.Context | None) -> str:
    command = ctx.meta.get("llmctl.command") if ctx else None
    names = {param.name for param in command.params} if command else set()
    flags = [f"--{name.replace('_', '-')}" for name in _MEMORY_FLAGS if name in names]
    return f"try a smaller {' or '.join(flags[:2])}" if flags else "close other programs or use a smaller model"


def _describe_os_error(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full while writing {error.filename or 'the output'}"
    reason = (error.strerror or _first_line(error)).lower()
    names = [os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike))]
    # What is written beside its name until it is complete is known to a person by that name.
    names = [re.sub(r"\.([^/]+)\.partial-[0-9a-f]+", r"\1", name) for name in names]
    return ": ".join([*names, reason])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _print(message: str, hint: str | None, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and code == 2:
        return  # every process was called with the same arguments: one of them says so
    if rank != "0":
        message = f"rank {rank}: {message}"
    try:
        click.echo(message, err=True)
        if hint:
            click.echo(f"hint: {hint}", err=True)
    except OSError:
        pass  # nobody is left to read it


def _stdout_reader_is_gone() -> bool:
    """Whether the broken pipe is our own output: one towards a worker process would be a failure."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _discard_stdout() -> None:
    """What is left in the buffer has no reader; without this the interpreter would fail once more as it exits."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass
