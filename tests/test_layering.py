"""The lines between the layers, and what may not be imported before a command does its work."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmctl"
FILES = sorted(PACKAGE.rglob("*.py"))
# The modules that speak with a person; everything else is the library.
FRONT = {"cli", "options", "ui", "failures", "command_line", "flag_sources", "reports", "chat_view", "result_tables"}
FRONT |= {"__main__"}
HEAVY = {
    "torch",
    "numpy",
    "pyarrow",
    "tokenizers",
    "bitsandbytes",
    "safetensors",
    "transformers",
    "rich",
    "prompt_toolkit",
    "yaml",
    "jinja2",
    "onnx",
    "onnxruntime",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(nodes) -> set[str]:
    """Full names of the modules that these statements import, absolute as this package writes them."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: Path, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    return imported(tree.body if top_level else ast.walk(tree))


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "commands" if parts[0] == "commands" else "front" if parts[0] in FRONT else "library"


def of_layer(name: str) -> list[Path]:
    return [path for path in FILES if layer(path) == name]


def under(*folders: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(PACKAGE).parts[: len(folders)] == folders]


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank nor written for people (docstrings, help and examples)."""
    text = path.read_text()
    constants = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    prose = {i for node in constants if isinstance(node.value, str) for i in range(node.lineno, node.end_lineno)}
    return sum(bool(line.strip()) and i not in prose for i, line in enumerate(text.splitlines(), start=1))


@pytest.mark.parametrize("path", of_layer("library"), ids=module_name)
def test_library_knows_nothing_of_the_command_line(path):
    for name in imports_of(path):
        assert name.split(".")[0] not in ("click", "rich", "prompt_toolkit"), f"{name} belongs to the commands"
        front = {f"llmctl.{module}" for module in FRONT | {"commands"}}
        assert not any(name == module or name.startswith(f"{module}.") for module in front), name


@pytest.mark.parametrize("path", of_layer("commands"), ids=module_name)
def test_commands_are_light_and_thin(path):
    for name in imports_of(path, top_level=True):
        assert name.split(".")[0] not in HEAVY, f"import {name} inside the callback"
    assert lines_of_code(path) <= 80, "a command parses, calls the library and prints"


@pytest.mark.parametrize("path", under("models", "families"), ids=module_name)
def test_a_family_is_built_of_config_values(path):
    outside = {name for name in imports_of(path) if name.startswith("llmctl.")}
    allowed = ("llmctl.models.config", "llmctl.models.weights", "llmctl.models.families", "llmctl.errors")
    assert all(name.startswith(allowed) for name in outside), outside


@pytest.mark.parametrize("path", under("ops"), ids=module_name)
def test_ops_stand_on_torch_alone(path):
    outside = {name for name in imports_of(path) if name.startswith("llmctl.")}
    assert all(name.startswith(("llmctl.ops", "llmctl.errors")) for name in outside), outside


@pytest.mark.parametrize("path", under("models"), ids=module_name)
def test_models_do_not_know_who_uses_them(path):
    for name in imports_of(path):
        assert not name.startswith(("llmctl.train", "llmctl.generation", "llmctl.data", "llmctl.streams")), name


def loaded_by(code: str, *args: str) -> set[str]:
    """Top-level packages in sys.modules after running `code` with these arguments."""
    program = f"import sys, json\ntry:\n  {code}\nfinally:\n  print('\\n' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program, *args], stdout=subprocess.PIPE, text=True, check=False)
    return {name.split(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


COMMANDS = sorted(path.stem.replace("_", "-") for path in under("commands") if path.stem != "__init__")
LIGHT_CALLS = [["--help"], ["--version"], [], ["no-such-command"], ["--no-such-flag"]]
LIGHT_CALLS += [[name, "--help"] for name in COMMANDS] + [[name, "--no-such-flag"] for name in COMMANDS]


@pytest.mark.parametrize("args", LIGHT_CALLS, ids=" ".join)
def test_help_and_usage_errors_load_nothing_heavy(args):
    assert not loaded_by("from llmctl.cli import main; main()", *args) & HEAVY


@pytest.mark.parametrize("words", [[""], ["generate", "--t"], ["run", ""]], ids=" ".join)
def test_completion_loads_nothing_heavy(words):
    code = "import os; os.environ['_LLMCTL_COMPLETE'] = '1'; from llmctl.cli import main; main()"
    assert not loaded_by(code, *words) & HEAVY


def test_importing_the_package_loads_nothing_heavy():
    assert importlib.util.find_spec("torch"), "the test would prove nothing"
    assert not loaded_by("import llmctl") & HEAVY
