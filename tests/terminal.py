"""A program at a terminal of its own (a pty), driven as a person does: type, and wait for what appears."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>78])")


class Terminal:
    """`llmctl ARGS` behind a pty; `seen` is all that it has written, without escape sequences."""

    def __init__(
        self, *args: object, cwd: object, env: dict[str, str] | None = None, rows: int = 50, columns: int = 120
    ):
        self.fd, inside = pty.openpty()
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmctl", *map(str, args)],
            stdin=inside, stdout=inside, stderr=inside, cwd=cwd, env=environment, start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inside)
        self.raw, self._from = "", 0

    @property
    def seen(self) -> str:
        return _ESCAPES.sub("", self.raw).replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def line(self, text: str) -> None:
        """Type a line and Enter, as two events, once the program waits for them."""
        self.wait_for_quiet(0.15)
        self._from = len(self.seen)
        self.type(text)
        self.wait_for_quiet(0.05)
        self.type("\r")

    def expect(self, pattern: str, seconds: float = 60.0) -> re.Match:
        """Wait until what came since the last line that was typed, or the last match, has the pattern."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.seen[self._from :])
            if found:
                self._from += found.end()
                return found
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(
                    f"no {pattern!r} in what followed:\n{self.seen[self._from :]}\n---\n{self.seen[-3000:]}"
                )

    def wait_for_quiet(self, seconds: float) -> None:
        while select.select([self.fd], [], [], seconds)[0]:
            if not self._read(seconds):
                return

    def interrupt(self) -> None:
        """Ctrl-C while the program runs, which the terminal makes a signal of."""
        os.killpg(self.process.pid, signal.SIGINT)

    def leave(self) -> int:
        """Ctrl-D; gives the exit code."""
        self.wait_for_quiet(0.15)
        self.type("\x04")
        return self.end()

    def end(self, seconds: float = 60.0) -> int:
        """Wait for the end; gives the exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.1)
        if self.process.poll() is None:
            self.process.kill()
            raise AssertionError(f"it did not end:\n{self.seen[-3000:]}")
        os.close(self.fd)
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        """False at the end."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.raw += data.decode(errors="replace")
        if b"\x1b[6n" in data:  # "where is the cursor?"
            self.type("\x1b[1;1R")
        return bool(data)
