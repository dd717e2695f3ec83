"""Python code that nobody has read, such as a model's, run in a process that can do little besides compute.

`sandbox_guard` says what the process gives up before the code begins; this side feeds it, watches the clock and keeps a
bounded part of what it prints.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import CalledWrongly, UserError

LEAST_MEGABYTES = 64  # an interpreter with little else
_GUARD = Path(__file__).with_name("sandbox_guard.py")
_SECONDS_TO_START = 30.0
_CHUNK = 65536


@dataclass(frozen=True)
class Outcome:
    """How a program ended and what it printed.

    `exit_code` is negative for a signal, as in `subprocess`. `timed_out`: the clock or the processor time ran out.
    `truncated`: it printed more than is kept here. `guards` names what held it ("network: ...", "files: ...").
    """

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    truncated: bool
    guards: tuple[str, ...] = ()


def run_python(code: str, seconds: float = 10.0, megabytes: int = 512, output_bytes: int = 65536) -> Outcome:
    """Run a program to its end, or until its time is over.

    `seconds` bound the time on the clock and on the processor, `megabytes` the address space, `output_bytes` what is
    kept of each of its two outputs; what it prints beyond is dropped while it goes on. It runs in an empty directory
    that vanishes afterwards, and without a network as far as `guards` say. Raises `UserError` where it cannot begin.
    """
    if not seconds > 0:
        raise CalledWrongly(f"a program's time is {seconds} seconds; expected more than 0")
    if megabytes < LEAST_MEGABYTES:
        raise CalledWrongly(f"a program's memory is {megabytes} MB; expected at least {LEAST_MEGABYTES}")
    with tempfile.TemporaryDirectory(prefix="llmctl-python-", ignore_cleanup_errors=True) as directory:
        Path(directory, "main.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        return _Run(directory, seconds, megabytes, output_bytes).to_end()


class _Run:
    """One guarded process, and what has been read from it so far."""

    def __init__(self, directory: str, seconds: float, megabytes: int, output_bytes: int):
        self.seconds, self.output_bytes = seconds, output_bytes
        self.kept = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
        self.truncated = self.timed_out = False
        read_end, write_end = os.pipe()
        limits = {"seconds": math.ceil(seconds), "megabytes": megabytes, "report": write_end}
        command = [sys.executable, "-I", "-B", "-X", "utf8", str(_GUARD), json.dumps(limits)]
        try:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env=_environment(directory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[write_end],
                start_new_session=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self.report = open(read_end, "rb", buffering=0)
        self.deadline = time.monotonic() + _SECONDS_TO_START + seconds

    def to_end(self) -> Outcome:
        try:
            self._read()
            self._wait()
        finally:
            self._kill()
            for pipe in (self.process.stdout, self.process.stderr, self.report):
                pipe.close()
        return self._outcome()

    def _read(self) -> None:
        """Read all pipes until they end or it is time; the clock starts anew when the guard has done its part."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ, "stdout")
            selector.register(self.process.stderr, selectors.EVENT_READ, "stderr")
            selector.register(self.report, selectors.EVENT_READ, "report")
            while selector.get_map():
                left = self.deadline - time.monotonic()
                if left <= 0:
                    self.timed_out = True
                    return
                for key, _ in selector.select(left):
                    data = os.read(key.fd, _CHUNK)
                    if not data:
                        selector.unregister(key.fileobj)
                        if key.data == "report":
                            self.deadline = time.monotonic() + self.seconds
                    self._keep(key.data, data)

    def _keep(self, name: str, data: bytes) -> None:
        kept = self.kept[name]
        room = self.output_bytes - len(kept) if name != "report" else len(data)
        kept += data[:room]
        self.truncated |= len(data) > room

    def _wait(self) -> None:
        """It may have closed its outputs and gone on."""
        try:
            self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.timed_out = True

    def _kill(self) -> None:
        # The group first: where forking could not be forbidden, its children are there.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def _outcome(self) -> Outcome:
        stdout, stderr = (bytes(self.kept[name]).decode(errors="replace") for name in ("stdout", "stderr"))
        code = self.process.returncode
        try:
            report = json.loads(self.kept["report"])
        except ValueError as error:
            raise UserError(f"the sandbox did not start (exit code {code}): {stderr.strip()[-300:]}") from error
        if "error" in report:
            raise UserError(f"the sandbox did not start: {report['error']}")
        timed_out = self.timed_out or code == -signal.SIGXCPU
        return Outcome(stdout, stderr, code, timed_out, self.truncated, tuple(report["guards"]))


def _environment(directory: str) -> dict[str, str]:
    """Nothing of ours. One arena and one thread each, since reserved address space counts as used."""
    single = {name: "1" for name in ("MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"PATH": os.defpath, "HOME": directory, "TMPDIR": directory, "LANG": "C.UTF-8", **single}
