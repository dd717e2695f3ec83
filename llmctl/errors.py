"""Errors that a person is meant to read; the command line turns each into one or two lines and an exit code."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Something the caller can mend: `message` says the value seen and the value expected, `hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class CalledWrongly(UserError):
    """The arguments contradict each other or name something that cannot be."""

    exit_code = 2


class CheckFailed(UserError):
    """A command's own check of its result fell short of the tolerance; nothing was left under the output name."""

    exit_code = 3


class Interrupted(Exception):
    """A signal asked the work to stop and it stopped cleanly; the exit code is 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str = "interrupted"):
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint with the nearest of the known names; None where none is near."""
    import difflib

    nearest = difflib.get_close_matches(word, list(known), n=2)
    return f"did you mean {' or '.join(nearest)}?" if nearest else None
