"""Attention of training, forward and backward, against torch's scaled_dot_product_attention, in alternating calls.

    python tests/bench/attention_training.py [--threads 2] [--rounds 5] [--documents 300]

Rows packed with documents, where torch gets a mask tensor, and plain causal order, where it has its own fast way. With
grouped heads torch has the better of enable_gqa and keys and values repeated for each head. Prints medians in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=300, help="tokens of a document")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    # batch, heads, kv heads, tokens, head size
    cases = [(4, 12, 12, 1024, 64), (1, 32, 4, 2048, 64), (2, 16, 8, 1024, 128)]
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases:
            for is_packed in (True, False):
                found = measure(torch, args, dtype, case, is_packed)
                figures = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in found.items())
                ratio = min(seconds for name, seconds in found.items() if name != "ours") / found["ours"]
                kind = "packed" if is_packed else "causal"
                print(f"{str(dtype)[6:]:<9}{kind:<8}{case!s:<26}ms: {figures}; {ratio:.2f} x torch", flush=True)


def measure(torch, args, dtype, case, is_packed) -> dict[str, float]:
    from llmctl.ops.attention import attention
    from llmctl.ops.visibility import Visibility

    batch, heads, kv_heads, tokens, size = case
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(batch, heads, tokens, size).to(dtype).requires_grad_()
    k, v = (torch.randn(batch, kv_heads, tokens, size).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(batch, heads, tokens, size).to(dtype)
    first_BT = (torch.arange(tokens) // args.documents * args.documents).expand(batch, tokens)
    visibility = Visibility(True, 0, first_BT if is_packed else None)
    mask = visibility.mask_BTS(tokens, tokens, q.device).unsqueeze(1) if is_packed else None
    how = {"attn_mask": mask, "is_causal": not is_packed}

    def repeated():
        return sdpa(q, *(x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)), **how)

    calls = {
        "ours": lambda: attention(q, k, v, visibility),
        "enable_gqa": lambda: sdpa(q, k, v, **how, enable_gqa=True),
        "repeated": repeated,
    }
    if heads == kv_heads:
        del calls["repeated"]
    times = {name: [] for name in calls}
    for _ in range(args.rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            torch.autograd.grad(call(), (q, k, v), grad)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


main()
