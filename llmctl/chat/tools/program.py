"""A model's Python program in the sandbox, and its outcome as the model reads it."""

from __future__ import annotations

from llmctl.sandbox import run_python


def run(code: str, seconds: float, megabytes: int) -> str:
    outcome = run_python(str(code), seconds, megabytes)
    parts = [outcome.stdout]
    if outcome.stderr:
        parts.append(f"[standard error]\n{outcome.stderr}")
    if outcome.truncated:
        parts.append("[it printed more than is kept; the rest is cut]")
    if outcome.timed_out:
        parts.append(f"[stopped: it ran longer than {seconds:g} seconds]")
    elif outcome.exit_code:
        parts.append(f"[exit code {outcome.exit_code}]")
    return "\n".join(part.rstrip("\n") for part in parts if part) or "[it printed nothing]"
