"""Wall time of what a person waits for before any work begins: help, a usage error, completion, against bare Python.

    python tests/bench/startup.py [REPEATS]

Prints a table of medians and the slowest, in milliseconds; DESIGN asks for less than 150.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time

CALLS = {
    "python -c pass": ([sys.executable, "-c", "pass"], {}),
    "llmctl --help": (["llmctl", "--help"], {}),
    "llmctl generate --help": (["llmctl", "generate", "--help"], {}),
    "llmctl pretrain --help": (["llmctl", "pretrain", "--help"], {}),
    "llmctl generate --nonsense": (["llmctl", "generate", "--nonsense"], {}),
    "llmctl <TAB>": (["llmctl", ""], {"_LLMCTL_COMPLETE": "1"}),
    "llmctl pretrain --<TAB>": (["llmctl", "pretrain", "--"], {"_LLMCTL_COMPLETE": "1"}),
}


def milliseconds(command: list[str], environment: dict[str, str], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)
        times.append((time.perf_counter() - started) * 1000)
    return times[1:]  # the first fills the file cache


def main() -> None:
    if not shutil.which("llmctl"):
        sys.exit("llmctl is not on PATH: pip install . first")
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print(f"{'call':<30}{'median':>8}{'slowest':>9}   ms")
    for name, (command, environment) in CALLS.items():
        times = milliseconds(command, environment, repeats)
        print(f"{name:<30}{statistics.median(times):>8.0f}{max(times):>9.0f}")


main()
