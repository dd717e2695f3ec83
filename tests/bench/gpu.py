"""The CUDA kernels against torch's own on the device at hand, in turn, as one table.

    python tests/bench/gpu.py [--repeats 50]

Decode attention is compared with the bandwidth of a copy on the same device, sampling with the sorting reference in torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

import torch

from llmctl.generation.rules import Rules
from llmctl.generation.sampling import Sampler
from llmctl.generation.settings import Sampling, resolve
from llmctl.ops import activation, norm
from llmctl.ops.attention import attention
from llmctl.ops.visibility import Visibility


def milliseconds(work, repeats: int) -> float:
    """The median on the device's own clock, the caches filled with something else before each."""
    other = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(repeats + 5):
        other.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[5:])


def copy_bandwidth(repeats: int) -> float:
    """GB/s read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), repeats) / 1e6


def both(work, repeats: int) -> tuple[float, float]:
    """(ours, torch's) in ms."""
    found = []
    for choice in ("cuda", "reference"):
        os.environ["LLMCTL_KERNELS"] = choice
        work()
        found.append(milliseconds(work, repeats))
    return found[0], found[1]


def row(name: str, ours: float, theirs: float, more: str = "") -> None:
    print(f"{name:48} {ours:9.4f} ms  torch {theirs:9.4f} ms  {theirs / ours:6.2f} x  {more}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    bandwidth = copy_bandwidth(repeats)
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth:.0f} GB/s")
    for batch, heads, kv_heads, length in [(1, 32, 4, 8192), (32, 32, 4, 8192), (32, 32, 8, 8192), (32, 32, 32, 2048)]:
        q = torch.randn(batch, heads, 1, 128, device="cuda").bfloat16()
        k, v = (torch.randn(batch, kv_heads, length, 128, device="cuda").bfloat16() for _ in range(2))
        seen = Visibility(True, length - 1)
        ours, theirs = both(lambda q=q, k=k, v=v, seen=seen: attention(q, k, v, seen), repeats)
        share = 4 * k.numel() / ours / 1e6 / bandwidth
        row(f"decode attention B{batch} H{heads}/{kv_heads} S{length} K128", ours, theirs, f"{share:.0%} of copy")
    for rows, top_k in [(1, 50), (32, 50), (32, 0)]:
        settings = [resolve(Sampling(seed=i, top_k=top_k, top_p=0.9)) for i in range(rows)]
        logits = torch.randn(rows, 128_256, device="cuda") * 3
        rules = Rules(settings, [[0]] * rows, logits.shape[1], logits.device)
        sampler = Sampler(settings, range(rows), rules, logits.device)
        row(f"sampling V128256 B{rows} top-k {top_k} top-p 0.9", *both(lambda s=sampler, x=logits: s.draw(x), repeats))
    x, weight = torch.randn(32, 4096, device="cuda").bfloat16(), torch.ones(4096, device="cuda").bfloat16()
    row("rms_norm 32 x 4096", *both(lambda: norm.rms_norm(x, weight, 1e-6), repeats))
    gate = torch.randn(8192, 14336, device="cuda").bfloat16()
    row("silu(x) * up, 8192 x 14336", *both(lambda: activation.activate("silu", gate, gate), repeats))


if __name__ == "__main__":
    main()
