"""Run commands joined as a shell would join them, and leave out those whose finished output is still right.

A step that names an earlier step's output waits for it (`&&`); any other step reads the previous step's standard
output (`|`). A finished step leaves `.NAME.step.json` beside its output NAME: the key of everything that shaped the
output, and the sizes and times of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import llmctl
from llmctl.errors import Interrupted, UserError
from llmctl.files import write_atomic

_log = logging.getLogger("llmctl")


@dataclass
class CommandLine:
    """A step: `arguments` as a process takes them, `shell` as a person types them, and the files that go in and out."""

    name: str
    arguments: list[str]
    shell: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    main_output: str | None = None


@dataclass
class Stage:
    """A step in its place: what it reads, what identifies its output, and whether that is there already."""

    number: int
    line: CommandLine
    is_piped: bool
    key: str | None = None
    is_done: bool = False

    @property
    def label(self) -> str:
        return f"step {self.number} ({self.line.name})"


class StepFailed(UserError):
    """A step ended with an error, which it has told itself; its exit code becomes ours."""

    def __init__(self, stage: Stage, code: int):
        code = 128 - code if code < 0 else code
        super().__init__(f"{stage.label} failed with exit code {code}")
        self.exit_code = code


def plan(lines: list[CommandLine]) -> list[Stage]:
    """Decide how the steps are joined and which of them need not run."""
    code = _code_sha256()
    stages: list[Stage] = []
    for number, line in enumerate(lines, start=1):
        makers = {path: _maker(path, stages) for path in line.inputs}
        stage = Stage(number, line, is_piped=bool(stages) and not any(makers.values()))
        stage.key = _key(stage, makers, stages[-1] if stage.is_piped else None, code)
        stage.is_done = stage.key is not None and _recorded(line) == _record(line, stage.key)
        stages.append(stage)
    for stage, following in zip(reversed(stages[:-1]), reversed(stages), strict=False):
        stage.is_done |= not stage.line.outputs and following.is_piped and following.is_done
    return stages


def shell_line(stages: list[Stage]) -> str:
    """The whole pipeline as a person would type it."""
    text = stages[0].line.shell
    for stage in stages[1:]:
        text += (" | " if stage.is_piped else " > /dev/null && ") + stage.line.shell
    return text


def run(stages: list[Stage], environment: Mapping[str, str]) -> None:
    """Run what is not done, with these variables added to the environment.

    Raises `StepFailed` for the first step of a pipe that fails, and `Interrupted` on a signal.
    """
    for stage in stages:
        if stage.is_done:
            _log.info("%s is up to date: %s", stage.label, stage.line.main_output or "the step that reads it is")
    starts = [i for i, stage in enumerate(stages) if not stage.is_piped]
    for start, stop in zip(starts, [*starts[1:], len(stages)], strict=True):
        is_last = stop == len(stages)
        if is_last and stages[-1].is_done:
            sys.stdout.buffer.write(_printed(stages[-1]))
        _run_pipe(stages[start:stop], None if is_last else subprocess.DEVNULL, environment)


def _run_pipe(stages: list[Stage], sink: int | None, environment: Mapping[str, str]) -> None:
    running: list[tuple[Stage, subprocess.Popen]] = []
    with _forwarded_signals(running) as received:
        source = None
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            if received:
                break
            if not stage.is_done:
                stdout = sink if following is None else subprocess.DEVNULL if following.is_done else subprocess.PIPE
                running.append((stage, _start(stage, source, stdout, environment)))
            if source:
                source.close()
            source = _stored_output(stage) if stage.is_done else running[-1][1].stdout
        if source:
            source.close()
        for _, process in running:
            process.wait()
    for stage, process in running:
        if process.returncode == 0 and stage.key is not None and stage.line.main_output:
            write_atomic(_record_path(stage.line), json.dumps(_record(stage.line, stage.key)).encode())
    if received:
        raise Interrupted(received[0])
    for stage, process in running:
        if process.returncode != 0:
            raise StepFailed(stage, process.returncode)


def _start(stage: Stage, source, stdout: int | None, environment: Mapping[str, str]) -> subprocess.Popen:
    # Its own session: a Ctrl-C at the terminal reaches us alone, and each step exactly once, through us.
    return subprocess.Popen(
        [sys.executable, "-m", "llmctl", *stage.line.arguments],
        stdin=source,
        stdout=stdout,
        start_new_session=True,
        env={**os.environ, **environment, "PYTHONSAFEPATH": "1"},
    )


@contextlib.contextmanager
def _forwarded_signals(running: list[tuple[Stage, subprocess.Popen]]):
    """Pass the signals that end a program on to every step, and yield the list of those received."""
    received: list[int] = []

    def forward(number, frame):
        received.append(number)
        for _, process in running:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _printed(stage: Stage) -> bytes:
    """What a finished step printed: the path of its output, or nothing that its reader still wants."""
    return os.fsencode(os.path.abspath(stage.line.main_output)) + b"\n" if stage.line.main_output else b""


def _stored_output(stage: Stage) -> BinaryIO:
    reader, writer = os.pipe()
    os.write(writer, _printed(stage))
    os.close(writer)
    return os.fdopen(reader, "rb")


def _maker(path: str, stages: list[Stage]) -> Stage | None:
    """The earlier step that writes `path` or a directory that holds it."""
    whole = Path(path).absolute()
    for stage in reversed(stages):
        for output in stage.line.outputs:
            made = Path(output).absolute()
            if made == whole or made in whole.parents:
                return stage
    return None


def _key(stage: Stage, makers: dict[str, Stage | None], feeder: Stage | None, code: str) -> str | None:
    """The identity of what a step makes; None where it reads our own standard input, which nobody can foresee."""
    reads_our_input = feeder is None and (not makers or "-" in makers)
    sources = [maker.key if maker else _sha256(path) for path, maker in makers.items() if path != "-"]
    if feeder:
        sources.append(feeder.key)
    if reads_our_input or None in sources:
        return None
    content = json.dumps([code, stage.line.arguments, sources])
    return hashlib.sha256(content.encode()).hexdigest()


def _record_path(line: CommandLine) -> Path:
    output = Path(line.main_output)
    return output.with_name(f".{output.name}.step.json")


def _recorded(line: CommandLine) -> dict | None:
    try:
        return json.loads(_record_path(line).read_bytes()) if line.main_output else None
    except (OSError, ValueError):
        return None


def _record(line: CommandLine, key: str) -> dict:
    files = {
        str(file): [file.stat().st_size, file.stat().st_mtime_ns] for path in line.outputs for file in _files(path)
    }
    return {"key": key, "files": files}


def _files(path: str | Path) -> list[Path]:
    """The file, or those of a directory at any depth."""
    path = Path(path)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.exists()


def _sha256(path: str | Path) -> str:
    """Over the names and contents of a file or directory; a path that is not there has an identity too."""
    total = hashlib.sha256()
    for file in _files(path):
        total.update(f"{file.relative_to(path)}\0".encode(errors="surrogateescape"))
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _code_sha256() -> str:
    total = hashlib.sha256(llmctl.__version__.encode())
    for file in sorted(Path(llmctl.__file__).parent.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()
