"""Encoding speed of GPT-2's BPE: this package, tiktoken and tokenizers, in alternating runs.

    python tests/bench/encode.py [--megabytes 20] [--document-kb 4] [--threads 2] [--rounds 5]

Prints medians in MB/s of UTF-8, list of str in, ids out, and the ratio of ours to each of the others.
Needs tiktoken, and the data that LLMCTL_DATA names (GPT-2's vocabulary and some novels).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

DATA = Path(os.environ.get("LLMCTL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def documents(files: list[Path], megabytes: float, document_kb: float) -> list[str]:
    """`megabytes` of the files' text, repeated where they hold less, in equal documents."""
    size, total = int(document_kb * 1000), int(megabytes * 1e6)
    text = "".join(path.read_text(errors="ignore") for path in files)
    parts = [text[i : i + size] for i in range(0, min(len(text), total), size)]
    return list(itertools.islice(itertools.cycle(parts), total // size))


def encoders(threads: int) -> dict[str, Callable[[list[str]], object]]:
    import tiktoken
    import tokenizers

    from llmctl.tokenizer import Tokenizer

    ours = Tokenizer.load(DATA / "tokenizers" / "gpt2")
    library = tokenizers.Tokenizer.from_str(ours.json)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ranks = {ours.token_bytes(token): token for token in range(ours.eos_id)}
    reference = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return {
        "llmctl": lambda texts: ours.encode_documents(texts, threads),
        "tiktoken": lambda texts: reference.encode_ordinary_batch(texts, num_threads=threads),
        "tokenizers": library.encode_batch_fast,
    }


def measure(texts: list[str], threads: int, rounds: int) -> dict[str, float]:
    """Median MB/s of each encoder; the rounds alternate, so that a busy moment of the machine meets all of them."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    programs = encoders(threads)
    seconds = {name: [] for name in programs}
    for _ in range(rounds):
        for name, encode in programs.items():
            start = time.perf_counter()
            encode(texts)
            seconds[name].append(time.perf_counter() - start)
    return {name: megabytes / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--document-kb", type=float, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # read when tokenizers first runs
    stdlib = Path(sysconfig.get_path("stdlib"))
    corpora = {
        "prose": sorted((DATA / "text").glob("*.txt")),
        "Python source": sorted(path for path in stdlib.rglob("*.py") if "site-packages" not in path.parts),
    }
    for name, files in corpora.items():
        speeds = measure(documents(files, args.megabytes, args.document_kb), args.threads, args.rounds)
        figures = ", ".join(f"{who} {speed:.1f}" for who, speed in speeds.items())
        ratios = ", ".join(f"{speeds['llmctl'] / speeds[who]:.1f} x {who}" for who in ("tiktoken", "tokenizers"))
        print(f"{name}: MB/s: {figures}; llmctl is {ratios}")


main()
