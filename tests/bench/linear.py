"""The matrix product of inference against torch's, in alternating calls.

    python tests/bench/linear.py [--threads 2] [--rounds 15] [--rows 1 4 8 32 128 512] [--isa avx2]

Shapes are those of a 1.1B model. Each call takes another copy of the weights, so that few rows are bound by memory, as in
decoding. Prints medians: GFLOP/s, GB/s of weights, and how many times torch's speed ours is. Set OMP_WAIT_POLICY=PASSIVE,
as llmctl does, or torch's threads spin through our turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["LLMCTL_KERNELS"] = "cpu"
SHAPES = [(2048, 2048), (5632, 2048), (2048, 5632), (32000, 2048)]
COPIES_BYTES = 256 << 20  # more than any cache holds


def seconds(calls: dict, rounds: int) -> dict[str, float]:
    times = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32, 128, 512])
    parser.add_argument("--isa")
    args = parser.parse_args()
    if args.isa:
        os.environ["LLMCTL_ISA"] = args.isa

    import torch

    from llmctl.ops.linear import linear

    torch.set_num_threads(args.threads)
    print(f"{'dtype':<9}{'weight':>12}{'rows':>6}{'GFLOP/s':>10}{'GB/s':>7}{'torch GFLOP/s':>15}{'ratio':>7}")
    for dtype in (torch.bfloat16, torch.float32):
        for n_out, n_in in SHAPES:
            n_copies = max(1, COPIES_BYTES // (n_out * n_in * dtype.itemsize))
            weights = [torch.randn(n_out, n_in).to(dtype) for _ in range(n_copies)]
            for rows in args.rows:
                x = torch.randn(rows, n_in).to(dtype)
                calls = {
                    "ours": lambda i, x=x, w=weights: linear(x, w[i % len(w)]),
                    "torch": lambda i, x=x, w=weights: torch.nn.functional.linear(x, w[(i + 1) % len(w)]),
                }
                with torch.inference_mode():
                    found = seconds(calls, args.rounds)
                flops, n_bytes = 2e-9 * rows * n_in * n_out, n_in * n_out * dtype.itemsize
                ours, theirs = found["ours"], found["torch"]
                print(
                    f"{str(dtype)[6:]:<9}{f'{n_out}x{n_in}':>12}{rows:>6}{flops / ours:>10.0f}{n_bytes / ours / 1e9:>7.1f}"
                    f"{flops / theirs:>15.0f}{theirs / ours:>7.2f}",
                    flush=True,
                )


main()
