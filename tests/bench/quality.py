"""Time to quality on a text: the whole way from text to checkpoint, ours and nanoGPT's documented CPU run, in turn.

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench/quality.py tinyshakespeare.txt --nanogpt nanoGPT [--iterations 2000] [--seconds 25]

The last tenth of the text is held out, and both are scored over all of it in bits per byte; time is the whole process's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NANOGPT_CPU_RUN = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --always_save_checkpoint=True"
)


def ours(args, folder: Path) -> tuple[float, float]:
    """(bits per byte, seconds)."""
    began = time.monotonic()
    run = folder / "run"
    tokenize = f"llmctl tokenize {shlex.quote(args.text)} --val-fraction 0.1 {args.tokenize_flags}"
    train = f"llmctl pretrain --time {args.seconds}s {args.train_flags} --overwrite -o {run}"
    subprocess.run(f"{tokenize} | {train}", shell=True, check=True, capture_output=not args.verbose)
    seconds = time.monotonic() - began
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "validation"][-1]["bits_per_byte"], seconds


def theirs(args, folder: Path) -> tuple[float, float]:
    data = Path(args.nanogpt, "data", "shakespeare_char")
    (data / "input.txt").write_text(Path(args.text).read_text())
    began = time.monotonic()
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    out = folder / "nano"
    flags = [*NANOGPT_CPU_RUN.split(), f"--out_dir={out}"]
    length = [f"--max_iters={args.iterations}", f"--lr_decay_iters={args.iterations}"]
    subprocess.run([sys.executable, "train.py", *flags, *length], cwd=args.nanogpt, check=True, capture_output=True)
    seconds = time.monotonic() - began
    return score_nanogpt(args.nanogpt, out / "ckpt.pt", data), seconds


def score_nanogpt(nanogpt: str, checkpoint: Path, data: Path) -> float:
    """Bits per byte of its last checkpoint over all held-out characters (the text is ASCII), in windows of its context."""
    import numpy as np
    import torch

    sys.path.insert(0, nanogpt)
    from model import GPT, GPTConfig

    saved = torch.load(checkpoint, weights_only=False)  # made by the run above
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    with open(data / "meta.pkl", "rb") as file:
        assert pickle.load(file)["vocab_size"] < 128
    ids = torch.from_numpy(np.fromfile(data / "val.bin", dtype=np.uint16).astype(np.int64))
    length, nats = saved["model_args"]["block_size"], 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            x, y = ids[start : start + length], ids[start + 1 : start + length + 1]
            nats += float(model(x[None, : len(y)], y[None])[1]) * len(y)
    return nats / math.log(2) / (len(ids) - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--nanogpt", help="a checkout; without it only ours runs")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seconds", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokenize-flags", default="--vocab-size 1024")
    parser.add_argument("--train-flags", default="--params 900k --seq-len 128")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    args.text, found = os.path.abspath(args.text), {}
    for _ in range(args.rounds):
        for run in (theirs, ours) if args.nanogpt else (ours,):
            with tempfile.TemporaryDirectory() as folder:
                bits, seconds = run(args, Path(folder))
            print(f"{run.__name__}: {bits:.4f} bits per byte in {seconds:.1f} s", flush=True)
            found.setdefault(run.__name__, []).append((bits, seconds))
    medians = {who: [statistics.median(column) for column in zip(*runs)] for who, runs in found.items()}
    if "theirs" in medians:
        (our_bits, our_seconds), (their_bits, their_seconds) = medians["ours"], medians["theirs"]
        print(f"ours {our_bits:.4f} in {our_seconds:.1f} s, nanoGPT {their_bits:.4f} in {their_seconds:.1f} s")
        print(f"time ratio {our_seconds / their_seconds:.2f}")


if __name__ == "__main__":
    main()
