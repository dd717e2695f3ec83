"""`llmctl tokenize`, the whole command, against its encoder alone on text that is already in memory.

    python tests/bench/tokenize_command.py [--megabytes 200] [--repeats 3]

The aim: at least 85 % of the encoder's own speed, start-up included. The text is the source of this Python installation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from llmctl.tokenizer import Tokenizer

DATA = Path(os.environ.get("LLMCTL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
DOCUMENT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", default=str(DATA / "tokenizers" / "gpt2"))
    arguments = parser.parse_args()
    text = corpus(arguments.megabytes * 1_000_000)
    documents = [text[start : start + DOCUMENT] for start in range(0, len(text), DOCUMENT)]
    n_bytes = len(text.encode())
    with tempfile.TemporaryDirectory() as folder:
        plain, lines = Path(folder, "corpus.txt"), Path(folder, "corpus.jsonl")
        plain.write_text(text)
        lines.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        commands = {
            "plain file": [str(plain)],
            "plain file, --val-fraction": [str(plain), "--val-fraction", "0.1"],
            "jsonl, 4 KB documents": [str(lines)],
        }
        encoder, whole = [], {name: [] for name in commands}
        for _ in range(arguments.repeats):  # in turn, so that a busy moment of the machine meets all of them
            encoder.append(seconds_of_encoder(documents, arguments.tokenizer))
            for name, flags in commands.items():
                whole[name].append(seconds_of_command([*flags, "--tokenizer", arguments.tokenizer]))
    alone = statistics.median(encoder)
    print(f"encoder alone: {n_bytes / alone / 1e6:.1f} MB/s")
    for name, seconds in whole.items():
        median = statistics.median(seconds)
        print(f"{name}: {n_bytes / median / 1e6:.1f} MB/s, {alone / median:.1%} of the encoder")


def corpus(n_bytes: int) -> str:
    """Real text that every machine has: the Python files of this installation, without the duplicates."""
    seen, parts, size = set(), [], 0
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("*.py"))):
        text = path.read_text(errors="replace")
        if hash(text) not in seen and size < n_bytes:
            seen.add(hash(text))
            parts.append(text)
            size += len(text.encode())
    return "".join(parts)


def seconds_of_encoder(documents: list[str], tokenizer: str) -> float:
    encoder = Tokenizer.load(tokenizer)
    encoder.encode_documents(documents[:10])
    started = time.perf_counter()
    encoder.encode_documents(documents)
    return time.perf_counter() - started


def seconds_of_command(flags: list[str]) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "llmctl", "--quiet", "tokenize", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
