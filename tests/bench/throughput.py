"""Training throughput at the GPT-2 124M shape (sequence 1024, micro-batch 4): ours against nanoGPT's model, in turn.

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench/throughput.py --nanogpt nanoGPT [--rounds 3] [--steps 4]

Both run AdamW on random tokens under bfloat16 autocast and torch.compile, each in a process of its own; the figure is the
median over the rounds of a round's median step.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

VOCAB, BATCH, LENGTH = 50257, 4, 1024


def ours(args):
    import numpy as np
    import torch

    from llmctl import allocator
    from llmctl.data.packing import Batch
    from llmctl.models.initialization import new_model
    from llmctl.models.shapes import preset
    from llmctl.train import optim
    from llmctl.train.loop import Trainer
    from llmctl.train.objectives import NextToken
    from llmctl.train.schedule import Schedule

    allocator.keep_freed_memory()
    model = new_model(preset("gpt2", VOCAB, LENGTH), seed=0)
    if args.compile:
        for block in model.layers:
            block.compile()
    trainer = Trainer(
        objective=NextToken(model, 0.0),
        optimizers=optim.build(model, args.optimizer, 6e-4, 0.1, (0.9, 0.95), 6e-4),
        schedule=Schedule("cosine", 10, 0.1, 0.1),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    rng = np.random.default_rng(0)

    def step():
        ids = rng.integers(0, VOCAB, (BATCH, LENGTH + 1))
        trainer.step([Batch(ids[:, :-1], ids[:, 1:], None)], BATCH * LENGTH)

    return step


def theirs(args):
    import torch

    sys.path.insert(0, args.nanogpt)
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=LENGTH, vocab_size=VOCAB, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    compiled = torch.compile(model) if args.compile else model

    def step():
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = compiled(ids[:, :-1], ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(args):
    step = {"ours": ours, "theirs": theirs}[args.only](args)
    for _ in range(2):
        step()
    seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    print(f"RESULT {BATCH * LENGTH / statistics.median(seconds):.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", choices=["ours", "theirs"])
    args = parser.parse_args()
    if args.only:
        return measure(args)
    rates = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        for who, found in rates.items():
            output = subprocess.run(
                [sys.executable, *sys.argv, "--only", who], capture_output=True, text=True, check=True
            )
            found.append(float(output.stdout.split("RESULT ")[1]))
            print(f"{who}: {found[-1]:.1f} tokens/s", flush=True)
    medians = {who: statistics.median(found) for who, found in rates.items()}
    print(
        f"ours {medians['ours']:.1f}, nanoGPT {medians['theirs']:.1f} tokens/s: {medians['ours'] / medians['theirs']:.2f} times"
    )


if __name__ == "__main__":
    main()
