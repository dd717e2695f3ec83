"""Shell completion: the scripts, and what the program answers to them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.completion_scripts import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("shell", SCRIPTS)
def test_generated_files_are_current(llmctl, shell):
    name, _ = SCRIPTS[shell]
    assert (ROOT / "completions" / name).read_text() == llmctl("completions", shell).stdout


def answers(llmctl, *words: str) -> list[list[str]]:
    lines = llmctl(*words, env={"_LLMCTL_COMPLETE": "1"}).stdout.splitlines()
    return [line.split("\t") for line in lines]


def test_commands_with_their_help(llmctl):
    found = {value: text for _, value, text in answers(llmctl, "")}
    assert {"run", "env", "generate"} <= found.keys() and found["env"].startswith("Show the versions")
    assert [value for _, value, _ in answers(llmctl, "comp")] == ["completions"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plot", "--sm"], ["--smooth"]),
        (["plot", "--x", ""], ["step", "tokens", "time"]),
        (["plot", "--x", "=", "to"], ["tokens"]),
        (["plot", "--x=to"], ["tokens"]),
        (["completions", ""], ["bash", "zsh", "fish"]),
    ],
)
def test_flags_and_choices(llmctl, words, expected):
    assert [value for kind, value, _ in answers(llmctl, *words) if kind == "plain"] == expected


@pytest.mark.parametrize(
    "words", [["plot", ""], ["plot", "runs/b"], ["plot", "a b", "-o", ""], ["run", "--recipe", "="]]
)
def test_paths_are_left_to_the_shell(llmctl, words):
    assert [kind for kind, _, _ in answers(llmctl, *words)] == ["file"]


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Puts an `llmctl` where shells find it."""
    program = tmp_path / "bin" / "llmctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmctl "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def in_shell(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash(on_path):
    script = "source completions/llmctl.bash; COMP_WORDS=(llmctl plot --x = t); COMP_CWORD=4; _llmctl llmctl t"
    assert in_shell("bash", "-c", f'{script}; echo "${{COMPREPLY[@]}}"') == "tokens time\n"


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh(on_path):
    script = "compdef() { :; }; _describe() { print -l -- $plain; }; source completions/_llmctl"
    assert in_shell("zsh", "-fc", f"{script}; words=(llmctl plot --x t); CURRENT=4; _llmctl") == "tokens\ntime\n"


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish(on_path):
    found = in_shell("fish", "--no-config", "-c", "source completions/llmctl.fish; complete -C 'llmctl plot --x t'")
    assert found.split() == ["time", "tokens"]
