"""SIGTERM and Ctrl-C: the first lets the current step finish, the second stops at once."""

from __future__ import annotations

import signal
import time

from llmctl.train import distributed

_SECONDS_OF_AN_ECHO = 1.0


class StopRequest:
    """A context in which the first SIGTERM or SIGINT only sets `requested` to its number.

    Under torchrun a Ctrl-C arrives twice, from the terminal and from torchrun: there an echo of the first is no second.
    """

    def __init__(self):
        self.requested: int | None = None
        self._requested_at = 0.0
        self._previous = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._requested_at = number, now
        elif not distributed.is_launched() or now - self._requested_at > _SECONDS_OF_AN_ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
