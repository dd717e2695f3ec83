"""Protein fitness from few measurements: what each method makes of 50, 200 and 1000 of them.

    python tests/bench/fitness.py avgfp-2000.jsonl [--steps 1500] [--base ESM] [--methods feature,head,lora,full]

An encoder learns masked residues of the sequences that are not held out, without their measurements; then each method learns
measurements, and is judged by the rank correlation (Spearman) on 500 variants that nothing has seen. Two rivals know no
model: the number of mutations, negated, which needs no measurement; and ridge regression on which residue stands where.

Rates and lengths of fine-tuning are defaults, or were chosen on the 500 variants that are neither held out nor measured for
training here. Each cell is one run, with seed 0.
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

import numpy as np

HELD_OUT, EPOCHS = 500, {50: 24, 200: 12, 1000: 6}
METHODS = {  # a head alone needs more steps, which cost little where the encoder runs once
    "feature": ["--method", "feature", "--batch-size", 16, "--steps", 2000],
    "head": ["--method", "freeze", "--batch-size", 16, "--steps", 400],
    "lora": ["--method", "lora", "--targets", "all-linear"],
    "full": ["--method", "full", "--lr", 1e-3],
}
VOCABULARY = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>".split()
"""ESM-2's."""
RIDGES = (0.1, 1, 10, 100)


def llmctl(*words: object) -> None:
    run = subprocess.run([sys.executable, "-m", "llmctl", *map(str, words)], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"llmctl {' '.join(map(str, words))}\n{run.stderr}")


def read(path: str) -> list[dict]:
    """The rows in an order of their own; the first ones are held out."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    return rows


def split(rows: list[dict], folder: Path) -> dict[str, Path]:
    """Files of the held-out rows, of the first rows to train on, and of all of these."""
    parts = {"held": rows[:HELD_OUT], "pool": rows[HELD_OUT:]}
    parts |= {str(size): rows[HELD_OUT : HELD_OUT + size] for size in EPOCHS}
    for name, part in parts.items():
        lines = (json.dumps({"text": row["text"], "label": row["label"]}) for row in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: folder / f"{name}.jsonl" for name in parts}


def rivals(rows: list[dict]) -> dict[str, list[float]]:
    from llmctl.evaluate.scores import spearman

    measured = np.array([row["label"] for row in rows])
    letters = np.array([list(row["text"]) for row in rows])
    one_hot = np.concatenate([letters == letter for letter in np.unique(letters)], 1).astype(float)
    held, count = measured[:HELD_OUT], -np.array([float(row["mutations"]) for row in rows])
    found: dict[str, list[float]] = {
        "mutation count": [spearman(count[:HELD_OUT], held)] * len(EPOCHS),
        "one-hot ridge": [],
    }
    for size in EPOCHS:
        train = slice(HELD_OUT, HELD_OUT + size)
        centred = one_hot - one_hot[train].mean(0)
        kernel, targets = centred[train] @ centred[train].T, measured[train] - measured[train].mean()
        weights = {ridge: np.linalg.solve(kernel + ridge * np.eye(size), targets) for ridge in RIDGES}
        left_out = {  # each training row from the others: the held-out rows choose nothing
            ridge: np.square(w / np.linalg.inv(kernel + ridge * np.eye(size)).diagonal()).sum()
            for ridge, w in weights.items()
        }
        best = weights[min(left_out, key=left_out.get)]
        found["one-hot ridge"].append(spearman(centred[:HELD_OUT] @ centred[train].T @ best, held))
    return found


def pretrain(pool: Path, folder: Path, steps: int, params: str) -> Path:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    llmctl("tokenize", pool, "--tokenizer", folder / "vocab.txt", "-o", folder / "pool.arrow")
    shape = ["--family", "esm", "--params", params, "--seq-len", 240, "--batch-size", 16]
    # A random token in the place of another is what a mutation is: a model that corrects the one forgets the other.
    masks = ["--mask-token-share", 1, "--random-token-share", 0]
    llmctl("pretrain", folder / "pool.arrow", *shape, *masks, "--steps", steps, "-o", folder / "esm")
    return folder / "esm"


def judged(base: Path, rows: Path, held: Path, output: Path, flags: list, epochs: int) -> tuple[float, float]:
    """(Spearman's correlation on the held-out rows after the last step, seconds)."""
    began = time.monotonic()
    flags = flags if "--steps" in flags else [*flags, "--epochs", epochs]
    how = ["--objective", "regress", "--pooling", "mean", "--validate-every", 10**6, "--overwrite"]
    llmctl("finetune", base, rows, *how, "--val-data", held, "-o", output, *flags)
    seconds = time.monotonic() - began
    return json.loads((output / "llmctl.json").read_text())["metrics"]["validation_spearman"], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining")
    parser.add_argument("--params", default="1M", help="of the encoder")
    parser.add_argument("--base", type=Path, help="an encoder that is pretrained already")
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    rows = read(args.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = split(rows, folder)
        began = time.monotonic()
        base = args.base or pretrain(files["pool"], folder, args.steps, args.params)
        print(f"pretrained in {time.monotonic() - began:.0f} s", flush=True)
        print("| method |", " | ".join(f"{size} rows" for size in EPOCHS), "| seconds |\n| --- |", "--- | " * 4)
        for rival, found in rivals(rows).items():
            print(f"| {rival} | {' | '.join(f'{spearman:.3f}' for spearman in found)} | |", flush=True)
        for method in args.methods.split(","):
            found = [
                judged(base, files[str(size)], files["held"], folder / method, METHODS[method], epochs)
                for size, epochs in EPOCHS.items()
            ]
            cells = " | ".join(f"{spearman:.3f}" for spearman, _ in found)
            print(f"| {method} | {cells} | {sum(seconds for _, seconds in found):.0f} |", flush=True)


if __name__ == "__main__":
    main()
