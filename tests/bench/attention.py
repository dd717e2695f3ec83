"""Attention of inference against torch's scaled_dot_product_attention, in alternating passes.

    python tests/bench/attention.py [--threads 2] [--rounds 15] [--context 4096] [--isa avx2]

Decoding (one query for each sequence) and reading prompts, with grouped heads. torch has the better of its two ways:
enable_gqa, or keys and values repeated for each head beforehand, at no cost to it. A pass goes through the keys and values
of several layers, as a model's step does. Prints the medians of a call, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["LLMCTL_KERNELS"] = "cpu"
LAYERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--isa")
    args = parser.parse_args()
    if args.isa:
        os.environ["LLMCTL_ISA"] = args.isa

    import torch

    torch.set_num_threads(args.threads)
    # batch, heads, kv heads, queries, head size
    cases = [(1, 32, 4, 1, 64), (1, 64, 8, 1, 128), (8, 32, 4, 1, 64), (1, 32, 32, 1, 128), (1, 32, 4, 512, 64)]
    print(
        f"{'dtype':<9}{'batch':>6}{'heads':>7}{'queries':>9}{'size':>6}{'us':>9}{'GB/s':>7}{'torch us':>10}{'ratio':>7}"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for batch, heads, kv_heads, queries, size in cases:
            ours, theirs, n_bytes = measure(torch, args, dtype, batch, heads, kv_heads, queries, size)
            print(
                f"{str(dtype)[6:]:<9}{batch:>6}{f'{heads}:{kv_heads}':>7}{queries:>9}{size:>6}{ours * 1e6:>9.0f}"
                f"{n_bytes / ours / 1e9:>7.1f}{theirs * 1e6:>10.0f}{theirs / ours:>7.2f}",
                flush=True,
            )


def measure(torch, args, dtype, batch, heads, kv_heads, queries, size) -> tuple[float, float, int]:
    """Our median seconds, torch's better median, and the bytes of keys and values."""
    from llmctl.ops.cached_attention import attention
    from llmctl.ops.visibility import Visibility

    sdpa = torch.nn.functional.scaled_dot_product_attention
    context = args.context
    q = torch.randn(batch, heads, queries, size).to(dtype)
    cache = [[torch.randn(batch, kv_heads, context, size).to(dtype) for _ in range(2)] for _ in range(LAYERS)]
    repeated = [[x.repeat_interleave(heads // kv_heads, 1) for x in pair] for pair in cache]
    visibility = Visibility(True, context - queries)
    mask = None if queries == 1 else visibility.mask_BTS(queries, context, q.device)
    calls = {
        "ours": lambda i: attention(q, *cache[i], visibility),
        "enable_gqa": lambda i: sdpa(q, *cache[i], attn_mask=mask, enable_gqa=True),
        "repeated": lambda i: sdpa(q, *repeated[i], attn_mask=mask),
    }
    times = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(args.rounds + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                for layer in range(LAYERS):
                    call(layer)
                times[name].append((time.perf_counter() - start) / LAYERS)
    found = {name: statistics.median(values[2:]) for name, values in times.items()}
    n_bytes = 2 * batch * kv_heads * context * size * dtype.itemsize
    return found["ours"], min(found["enable_gqa"], found["repeated"]), n_bytes


main()
