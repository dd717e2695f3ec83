"""Drawing tokens: the kernel against the usual sort-based sampler in torch, and against our own definition in torch.

    python tests/bench/sampling.py [--threads 2] [--rounds 15] [--batch 32] [--vocab 128000]

The sort-based one does what transformers' logits processors do, row by row of its own settings: temperature, top-k by a
threshold, top-p over the sorted rest, softmax and multinomial. Alternating calls; prints medians in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CASES = {"top-k 50, top-p 0.9": (50, 0.9), "top-k 50": (50, 1.0), "top-p 0.9": (0, 0.9), "all tokens": (0, 1.0)}


def sort_based(torch, logits, temperature, top_k, top_p):
    logits = logits / temperature
    if top_k:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, places = logits.sort(descending=False)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1:] = False
        logits = logits.masked_fill(dropped.scatter(1, places, dropped), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=128_000)
    args = parser.parse_args()

    import torch

    from llmctl.generation.rules import Rules
    from llmctl.generation.sampling import Sampler
    from llmctl.generation.settings import Sampling, resolve

    torch.set_num_threads(args.threads)
    logits = 3 * torch.randn(args.batch, args.vocab)
    for name, (top_k, top_p) in CASES.items():
        rows = [resolve(Sampling(temperature=0.8, top_k=top_k, top_p=top_p, seed=i)) for i in range(args.batch)]
        rules = Rules(rows, [[0]] * args.batch, args.vocab)
        sampler = Sampler(rows, range(args.batch), rules)

        def drawn(kernels, sampler=sampler):
            os.environ["LLMCTL_KERNELS"] = kernels
            return sampler.draw(logits)

        calls = {
            "kernel": lambda drawn=drawn: drawn("cpu"),
            "sort": lambda k=top_k, p=top_p: sort_based(torch, logits, 0.8, k, p),
            "ours in torch": lambda drawn=drawn: drawn("reference"),
        }
        times = {who: [] for who in calls}
        with torch.inference_mode():
            for _ in range(args.rounds + 1):
                for who, call in calls.items():
                    start = time.perf_counter()
                    call()
                    times[who].append(time.perf_counter() - start)
        found = {who: statistics.median(values[1:]) for who, values in times.items()}
        figures = ", ".join(f"{who} {seconds * 1e3:.2f}" for who, seconds in found.items())
        ratio = found["sort"] / found["kernel"]
        print(f"{name}: ms: {figures}; kernel is {ratio:.1f} x sort-based torch", flush=True)


main()
