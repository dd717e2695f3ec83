"""The tools that a model may call: what it is told of them, and what a call gives."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.chat.tools import calculator, files, program
from llmctl.errors import CalledWrongly, UserError, did_you_mean

RESULT_CHARACTERS = 8000


@dataclass(frozen=True)
class Call:
    """What a model asks for. `problem` says why it cannot be run: no JSON, no such tool, missing arguments."""

    name: str
    arguments: dict[str, Any]
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={_short(value)}' for key, value in self.arguments.items())})"


@dataclass(frozen=True)
class Tool:
    """`run` takes the arguments by name and gives text; what goes wrong it raises as `UserError`.

    `reaches_out`: it does more than compute, so that nobody but a person lets text from elsewhere lead to it.
    """

    name: str
    description: str
    parameters: dict[str, str]
    """Each argument's JSON type and what it means, as "string: the expression"; all that do not begin with ? are needed."""
    run: Callable[..., str]
    reaches_out: bool = True

    def schema(self) -> dict:
        """As chat templates take it."""
        properties, required = {}, []
        for name, words in self.parameters.items():
            kind, _, description = words.lstrip("?").partition(": ")
            properties[name] = {"type": kind, "description": description}
            required += [] if words.startswith("?") else [name]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


class Toolbox:
    """Tools by name. Their results are bounded, and a failure is a result too, which the model may mend."""

    def __init__(self, tools: Sequence[Tool]):
        self.tools = {tool.name: tool for tool in tools}

    def schemas(self) -> list[dict]:
        return [tool.schema() for tool in self.tools.values()]

    def problem(self, call: Call) -> str | None:
        """Why a call cannot be run."""
        if call.problem:
            return call.problem
        if call.name not in self.tools:
            return f"there is no tool {call.name!r}; there are {', '.join(self.tools)}"
        wanted = self.tools[call.name].parameters
        missing = [name for name, words in wanted.items() if name not in call.arguments and not words.startswith("?")]
        if missing:
            return f"{call.name} needs {', '.join(missing)}"
        unknown = [name for name in call.arguments if name not in wanted]
        return f"{call.name} takes {', '.join(wanted)}, not {', '.join(unknown)}" if unknown else None

    def run(self, call: Call) -> str:
        """The result, or why there is none."""
        if problem := self.problem(call):
            return f"error: {problem}"
        try:
            return cut(self.tools[call.name].run(**call.arguments))
        except UserError as error:
            return cut(f"error: {error.message}")
        except (TypeError, ValueError, OSError, ArithmeticError, RecursionError, MemoryError) as error:
            return cut(f"error: {type(error).__name__}: {error}")


def cut(text: str, characters: int = RESULT_CHARACTERS) -> str:
    """The beginning of a text that is long, and how much is left out."""
    rest = len(text) - characters
    return text if rest <= 0 else f"{text[:characters]}\n[cut: {rest:,} characters more]"


def named(names: Sequence[str], directory: str, seconds: float, megabytes: int) -> Toolbox | None:
    """The tools of --tools; None where none is named. Raises `CalledWrongly` for a name that is no tool's."""
    wanted = [name.strip() for name in ",".join(names).split(",") if name.strip()]
    tools = []
    for name in wanted:
        if name not in _GROUPS:
            raise CalledWrongly(
                f"--tools: no tool {name!r}; there are {', '.join(_GROUPS)}", hint=did_you_mean(name, _GROUPS)
            )
        tools += _GROUPS[name](directory, seconds, megabytes)
    return Toolbox(tools) if tools else None


def _calculator(directory: str, seconds: float, megabytes: int) -> list[Tool]:
    return [
        Tool(
            "calculator",
            "Computes an arithmetic expression exactly or in floating point, such as (17*23+4)/5 or sqrt(2).",
            {"expression": "string: numbers, + - * / // % ** ( ), and functions such as sqrt, log, sin, factorial"},
            calculator.compute,
            reaches_out=False,
        )
    ]


def _python(directory: str, seconds: float, megabytes: int) -> list[Tool]:
    return [
        Tool(
            "python",
            "Runs a Python program, without network or files, and gives what it prints.",
            {"code": "string: the program; print what is to be seen"},
            functools.partial(program.run, seconds=seconds, megabytes=megabytes),
        )
    ]


def _files(directory: str, seconds: float, megabytes: int) -> list[Tool]:
    place = files.Directory(directory)
    return [
        Tool(
            "list_files", "Lists a directory.", {"path": "?string: the directory; the top one if left out"}, place.list
        ),
        Tool(
            "read_file",
            "Reads a part of a text file.",
            {
                "path": "string: the file",
                "first_line": "?integer: where to begin, 1 if left out",
                "lines": "?integer: how many, 200 if left out",
            },
            place.read,
        ),
    ]


_GROUPS = {"calculator": _calculator, "python": _python, "files": _files}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"
