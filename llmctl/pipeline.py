"""Run commands joined as a shell would join them, and leave out those whose finished output is still right.

A step that names the output of a step still running waits for it (`&&`); any other step reads the previous step's
standard output (`|`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from llmctl import freshness
from llmctl.errors import Interrupted, UserError

_log = logging.getLogger("llmctl")


@dataclass
class CommandLine:
    """A step: `arguments` as a process takes them, `shell` as a person types them, and the files that go in and out."""

    name: str
    arguments: list[str]
    shell: str
    inputs: list[str] = field(default_factory=list)
    reads_stdin: bool = False
    outputs: list[str] = field(default_factory=list)
    main_output: str | None = None


@dataclass(eq=False)
class Stage:
    """A step in its place: the steps that make its input files, and the one whose standard output it reads."""

    number: int
    line: CommandLine
    makers: dict[str, Stage | None]
    feeder: Stage | None

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
    """Decide how the steps are joined."""
    stages: list[Stage] = []
    pipe: list[Stage] = []
    for number, line in enumerate(lines, start=1):
        makers = {path: maker_of(path, stages) for path in line.inputs if path != "-"}
        waits = any(maker in pipe for maker in makers.values())
        pipe = [] if waits else pipe
        stage = Stage(number, line, makers, feeder=pipe[-1] if pipe else None)
        stages.append(stage)
        pipe.append(stage)
    return stages


def maker_of(path: str, stages: list[Stage]) -> Stage | None:
    """The last of the stages that writes `path` or a directory that holds it."""
    whole = Path(path).absolute()
    for stage in reversed(stages):
        for output in stage.line.outputs:
            made = Path(output).absolute()
            if made == whole or made in whole.parents:
                return stage
    return None


def shell_line(stages: list[Stage]) -> str:
    """The whole pipeline as a person would type it."""
    text = stages[0].line.shell
    for stage in stages[1:]:
        text += (" | " if stage.feeder else " > /dev/null && ") + stage.line.shell
    return text


def run(stages: list[Stage], environment: Mapping[str, str]) -> None:
    """Run what is not up to date, with these variables added to the environment.

    Raises `StepFailed` for the first step of a pipe that fails, and `Interrupted` on a signal.
    """
    keys = freshness.keys(stages)
    fresh = freshness.fresh(stages, keys)
    for stage in fresh:
        _log.info("%s is up to date: %s", stage.label, stage.line.main_output or "the step that reads it is")
    starts = [i for i, stage in enumerate(stages) if not stage.feeder]
    for start, stop in zip(starts, [*starts[1:], len(stages)], strict=True):
        is_last = stop == len(stages)
        if is_last and stages[-1] in fresh:
            sys.stdout.buffer.write(_printed(stages[-1]))
        pipe = _Pipe(stages[start:stop], fresh, None if is_last else subprocess.DEVNULL, environment)
        pipe.run(keys)


class _Pipe:
    """Stages that run at the same time, each reading the one before it."""

    def __init__(self, stages: list[Stage], fresh: set[Stage], sink: int | None, environment: Mapping[str, str]):
        self.stages, self.fresh, self.sink = stages, fresh, sink
        self.environment = {**os.environ, **environment, "PYTHONSAFEPATH": "1"}
        self.processes: dict[Stage, subprocess.Popen] = {}
        self.received: list[int] = []

    def run(self, keys: Mapping[Stage, str | None]) -> None:
        with self._forwarding_signals():
            self._start()
            codes = {stage: process.wait() for stage, process in self.processes.items()}
        for stage, code in codes.items():
            if code == 0:
                freshness.record(stage, keys[stage])
        if self.received:
            raise Interrupted(self.received[0])
        for stage, code in codes.items():
            if code != 0:
                raise StepFailed(stage, code)

    def _start(self) -> None:
        source = None
        for stage, following in zip(self.stages, [*self.stages[1:], None], strict=True):
            if self.received:
                break
            if stage not in self.fresh:
                is_unread = following in self.fresh
                stdout = self.sink if following is None else subprocess.DEVNULL if is_unread else subprocess.PIPE
                self.processes[stage] = self._process(stage, source, stdout)
            if source:
                source.close()
            source = _stored_output(stage) if stage in self.fresh else self.processes[stage].stdout
        if source:
            source.close()

    def _process(self, stage: Stage, stdin: BinaryIO | None, stdout: int | None) -> subprocess.Popen:
        # Its own session: a Ctrl-C at the terminal reaches us alone, and each step exactly once, through us.
        command = [sys.executable, "-m", "llmctl", *stage.line.arguments]
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, start_new_session=True, env=self.environment)

    @contextlib.contextmanager
    def _forwarding_signals(self):
        """Pass the signals that end a program on to every step, and note them."""

        def forward(number, frame):
            self.received.append(number)
            for process in self.processes.values():
                process.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
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
