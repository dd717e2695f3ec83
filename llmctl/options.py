"""What every command's flags have in common: value types, flags from dataclasses, recipes, and the shape of `--help`."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing

import click

from llmctl import quantities
from llmctl.flag_sources import read_recipe, refuse_unknown_variables, variable

COMMON = "Common options"


class Quantity(click.ParamType):
    """A number as people write it, from `at_least` to `at_most` and strictly above `above`."""

    def __init__(self, name, parse, show=str, at_least=None, at_most=None, above=None):
        self.name = name
        self.parse = parse
        self.show = show
        self.at_least, self.at_most, self.above = at_least, at_most, above

    def convert(self, value, param, ctx):
        try:
            number = self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self.at_least is not None and number < self.at_least:
            self.fail(f"expected at least {self.at_least}, got {value}", param, ctx)
        if self.above is not None and number <= self.above:
            self.fail(f"expected more than {self.above}, got {value}", param, ctx)
        if self.at_most is not None and number > self.at_most:
            self.fail(f"expected at most {self.at_most}, got {value}", param, ctx)
        return number

    def written(self, number) -> str:
        """The number as a flag takes it: 100M for 100000000, but 8192 as it is."""
        text = self.show(number).replace(" ", "")
        return text if self.parse(text) == number else str(number)

    def limited(self, metadata) -> Quantity:
        """The same kind of number within a dataclass field's own limits."""
        limits = {key: metadata.get(key, getattr(self, key)) for key in ("at_least", "at_most", "above")}
        return Quantity(self.name, self.parse, self.show, **limits)

    def get_metavar(self, param, ctx=None):
        return self.name.upper()


INT = Quantity("int", quantities.parse_int)
FLOAT = Quantity("float", quantities.parse_float)
COUNT = Quantity("count", quantities.parse_count, quantities.format_count, at_least=0)
SIZE = Quantity("size", quantities.parse_size, quantities.format_size, at_least=0)
DURATION = Quantity("duration", quantities.parse_duration, quantities.format_duration, at_least=0)
INTERVAL = Quantity("steps|duration", quantities.parse_interval, quantities.format_interval, above=0)
PATH = click.Path()  # something to read; a path that is not there is reported by whoever opens it
OUTPUT = click.Path(writable=True)  # something to write: a step of a recipe that names it makes it

_NAMED_TYPES = {
    "count": COUNT,
    "size": SIZE,
    "duration": DURATION,
    "interval": INTERVAL,
    "path": PATH,
    "output": OUTPUT,
}
_PYTHON_TYPES = {int: INT, float: FLOAT, str: click.STRING}


class Option(click.Option):
    """An option that knows its section of `--help`."""

    def __init__(self, *args, group: str = "Options", **attrs):
        attrs.setdefault("show_default", True)
        super().__init__(*args, **attrs)
        self.group = group

    def get_help_extra(self, ctx):
        extra = super().get_help_extra(ctx)
        if isinstance(self.type, Quantity) and isinstance(self.default, (int, float)) and "default" in extra:
            extra["default"] = self.type.written(self.default)
        elif isinstance(self.show_default, str):
            extra["default"] = self.show_default
        elif self.default is False:
            extra.pop("default", None)  # that a switch is off goes without saying
        return extra


class Command(click.Command):
    """A command with sections and examples in its help, which takes its flags from a recipe too."""

    def __init__(self, *args, examples: str = "", takes_recipe: bool = True, **attrs):
        super().__init__(*args, **attrs)
        self.examples = examples
        self.context_settings = {"max_content_width": 100, "show_default": True, **self.context_settings}
        self.params += [*([_recipe_option()] if takes_recipe else []), *_message_options()]

    def parse_args(self, ctx, args):
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        refuse_unknown_variables(ctx)
        return rest

    def invoke(self, ctx):
        ctx.meta["llmctl.command"] = self
        return super().invoke(ctx)

    def format_options(self, ctx, formatter):
        sections: dict[str, list] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record:
                group = COMMON if param is self.get_help_option(ctx) else getattr(param, "group", "Options")
                sections.setdefault(group, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx, formatter):
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")
        formatter.write_paragraph()
        formatter.write_text(f"The environment sets flags too: {variable(self.name, '<FLAG>')}=VALUE.")


def command(examples: str, **attrs):
    """Make a function a command; `examples` are shell lines, shown in its help and checked by a test."""
    return click.command(cls=Command, examples=examples, **attrs)


def settings(cls, into: str = "settings"):
    """Add one flag per field of the dataclass `cls`; the callback gets keyword `into`, an instance of it.

    A field's metadata may hold: `help`, `flags` (further names: "--lr", "-n"), `group` (section of the help), `metavar`,
    `type` (one of `_NAMED_TYPES`, or a tuple of choices), `at_least`, `at_most`, `above`, `show_default`.
    """
    fields = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls)

    def decorate(function):
        @functools.wraps(function)
        def collected(*args, **kwargs):
            values = {field.name: kwargs.pop(field.name) for field in fields}
            return function(*args, **{into: cls(**values)}, **kwargs)

        for field in reversed(fields):
            collected = _field_option(field, hints[field.name])(collected)
        return collected

    return decorate


def model_argument(function=None, *, required: bool = True):
    """A positional MODEL: a checkpoint directory, or `-` to read its path from standard input."""
    argument = click.argument("model", metavar="MODEL", type=PATH, required=required)
    return argument(function) if function else argument


def output_option(function=None, *, help: str = "Where to write the result.", required: bool = False):
    """`--output/-o PATH`."""
    option = click.option("--output", "-o", cls=Option, type=OUTPUT, metavar="PATH", required=required, help=help)
    return option(function) if function else option


def resolved_flags() -> dict[str, object]:
    """The running command's arguments and flags by long name, whatever set them: what a lineage records."""
    ctx = click.get_current_context()
    return {name.replace("_", "-"): value for name, value in ctx.params.items()}


def given(name: str) -> bool:
    """Whether the running command's flag (by its parameter name) was set by anyone, rather than left at its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT)


def typed_fields(settings) -> frozenset[str]:
    """The fields of a settings object that stand on the command line."""
    ctx, typed = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    return frozenset(f.name for f in dataclasses.fields(settings) if ctx.get_parameter_source(f.name) is typed)


def given_fields(settings) -> frozenset[str]:
    """The fields of a settings object that were set by anyone, rather than left at their defaults."""
    return frozenset(field.name for field in dataclasses.fields(settings) if given(field.name))


def _field_option(field, hint):
    metadata = field.metadata
    value_type, multiple = _value_type(hint, metadata)
    kebab = field.name.rstrip("_").replace("_", "-")
    is_switch = value_type is bool
    flags = [f"--{kebab}/--no-{kebab}" if is_switch else f"--{kebab}", *metadata.get("flags", ())]
    attrs = {"type": None if is_switch else value_type, "multiple": multiple, **_default(field)}
    for key in ("help", "metavar", "show_default"):
        if key in metadata:
            attrs[key] = metadata[key]
    return click.option(field.name, *flags, cls=Option, group=metadata.get("group", "Options"), **attrs)


def _default(field) -> dict:
    if field.default is not dataclasses.MISSING:
        return {"default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {"default": field.default_factory()}
    return {"required": True}


def _value_type(hint, metadata):
    """The click type of a field's annotation (or of its metadata), and whether the flag may be repeated."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    multiple = typing.get_origin(hint) in (tuple, list)
    if multiple:
        hint = typing.get_args(hint)[0]
    named = metadata.get("type")
    if isinstance(named, tuple):
        return click.Choice(named), multiple
    if typing.get_origin(hint) is typing.Literal:
        return click.Choice(typing.get_args(hint)), multiple
    if hint is bool:
        return bool, multiple
    value_type = _NAMED_TYPES[named] if named else _PYTHON_TYPES[hint]
    return value_type.limited(metadata) if isinstance(value_type, Quantity) else value_type, multiple


def _recipe_option():
    return Option(
        ["--recipe"],
        type=PATH,
        metavar="FILE",
        is_eager=True,
        callback=read_recipe,
        group=COMMON,
        expose_value=False,
        help="Take flags from a YAML file; a flag given here or in the environment wins.",
    )


def _message_options():
    switches = {"--quiet": "No notes and no progress, only warnings.", "--debug": "Show the traceback of an error."}
    return [
        Option([flag], is_flag=True, is_eager=True, callback=_remember, expose_value=False, group=COMMON, help=help)
        for flag, help in switches.items()
    ]


def _remember(ctx, param, value):
    ctx.meta[f"llmctl.{param.name}"] = ctx.meta.get(f"llmctl.{param.name}", False) or value
