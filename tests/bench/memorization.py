"""How much of its training data a model gives away when documents were in it 1, 10 and 100 times.

    python tests/bench/memorization.py [--texts stories.jsonl] [--time 3m] [--keep DIR]

Trains a small model on stories of which some are repeated, continues their beginnings with `llmctl eval --suite
memorization` and prints a table; the report with its plots lies in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(os.environ.get("LLMCTL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
COPIES = {1: 200, 10: 20, 100: 5}
"""How many documents there are of each number of copies."""


def llmctl(*args: object) -> str:
    command = [sys.executable, "-m", "llmctl", *map(str, args)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def write_corpus(stories: list[str], path: Path) -> None:
    stories = iter(stories)
    with path.open("w") as file:
        for copies, count in COPIES.items():
            for _ in range(count):
                file.write((json.dumps({"text": next(stories)[:700]}) + "\n") * copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, default=DATA / "text" / "tinystories.jsonl")
    parser.add_argument("--time", default="3m")
    parser.add_argument("--params", default="1M")
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        stories = [json.loads(line)["text"] for line in chosen.texts.open()]
        write_corpus([story for story in stories if len(story) > 500], folder / "corpus.jsonl")
        llmctl("tokenize", folder / "corpus.jsonl", "--vocab-size", 1024, "-o", folder / "corpus.arrow", "--overwrite")
        shape = ["--params", chosen.params, "--seq-len", 256, "--time", chosen.time]
        model = llmctl("pretrain", folder / "corpus.arrow", *shape, "-o", folder / "model", "--overwrite").strip()
        out = folder / "memorization.jsonl"
        numbers = llmctl(
            "eval", model, folder / "corpus.arrow", "--suite", "memorization", "--json", "-o", out, "--overwrite"
        )
        llmctl("eval", "--report", folder / "report.html", out, "--overwrite")
        print_table([json.loads(line) for line in numbers.splitlines()])


def print_table(numbers: list[dict]) -> None:
    for metric in ("exact", "approximate", "in_training_data", "longest_span"):
        table: dict[int, dict[int, str]] = {}
        for each in numbers:
            if each["metric"] == metric and each.get("group"):
                _, copies, _, prefix = each["group"].split(" ")
                table.setdefault(int(copies), {})[int(prefix)] = f"{each['value']:.2f} ± {each['stderr'] or 0:.2f}"
        prefixes = sorted({prefix for row in table.values() for prefix in row})
        print(f"{metric}: copies by tokens of the prefix")
        print("\t".join(["", *map(str, prefixes)]))
        for copies in sorted(table):
            print("\t".join([str(copies), *(table[copies].get(prefix, "") for prefix in prefixes)]))


if __name__ == "__main__":
    main()
