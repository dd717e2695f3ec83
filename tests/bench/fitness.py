"""Protein fitness from few measurements: what each method makes of 50, 200 and 1000 of them.

    python tests/bench/fitness.py avgfp-2000.jsonl [--steps 300] [--methods head,lora,full]

An encoder learns masked residues of the sequences that are not held out, without their measurements; then each method learns
measurements, and is judged by the rank correlation on 500 variants that nothing has seen.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HELD_OUT, SIZES = 500, (50, 200, 1000)
METHODS = {
    "feature": ["--method", "feature"],
    "head": ["--method", "freeze"],
    "lora": ["--method", "lora", "--targets", "all-linear"],
    "full": ["--method", "full"],
}
VOCABULARY = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>".split()
"""ESM-2's."""


def llmctl(*words: object) -> None:
    run = subprocess.run([sys.executable, "-m", "llmctl", *map(str, words)], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"llmctl {' '.join(map(str, words))}\n{run.stderr}")


def split(path: str, folder: Path) -> dict[str, Path]:
    """Files of the held-out rows, of the first rows to train on, and of all of these."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    parts = {"held": rows[:HELD_OUT], "pool": rows[HELD_OUT:]}
    parts |= {str(size): rows[HELD_OUT : HELD_OUT + size] for size in SIZES}
    for name, part in parts.items():
        lines = (json.dumps({"text": row["text"], "label": row["label"]}) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: folder / f"{name}.jsonl" for name in parts}


def pretrain(pool: Path, folder: Path, steps: int) -> Path:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    llmctl("tokenize", pool, "--tokenizer", folder / "vocab.txt", "-o", folder / "pool.arrow")
    shape = ["--family", "esm", "--params", "1M", "--seq-len", 256, "--batch-size", 16]
    llmctl("pretrain", folder / "pool.arrow", *shape, "--steps", steps, "-o", folder / "esm")
    return folder / "esm"


def judged(base: Path, rows: Path, held: Path, output: Path, flags: list[str]) -> tuple[float, float]:
    """(Spearman's correlation on the held-out rows after the last step, seconds)."""
    began = time.monotonic()
    llmctl("finetune", base, rows, "--objective", "regress", "--val-data", held, "-o", output, *flags)
    seconds = time.monotonic() - began
    return json.loads((output / "llmctl.json").read_text())["metrics"]["validation_spearman"], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=300, help="of pretraining")
    parser.add_argument("--base", type=Path, help="an encoder that is pretrained already")
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = split(args.data, folder)
        began = time.monotonic()
        base = args.base or pretrain(files["pool"], folder, args.steps)
        print(f"pretrained in {time.monotonic() - began:.0f} s", flush=True)
        print(
            "| method |",
            " | ".join(f"{size} rows" for size in SIZES),
            "| seconds |\n| --- |",
            "--- | " * (len(SIZES) + 1),
        )
        for method in args.methods.split(","):
            found = [
                judged(base, files[str(size)], files["held"], folder / f"{method}-{size}", METHODS[method])
                for size in SIZES
            ]
            cells = " | ".join(f"{spearman:.3f}" for spearman, _ in found)
            print(f"| {method} | {cells} | {sum(seconds for _, seconds in found):.0f} |", flush=True)


if __name__ == "__main__":
    main()
