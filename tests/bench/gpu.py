"""The CUDA kernels against torch's own on the device at hand, in turn, as one table.

    python tests/bench/gpu.py [--repeats 50] [--kinds bf16 int4-64 int8-128]

Decode attention, products with weights in few bits and decode steps are compared with the bandwidth of a copy on the same device,
these products with torch's of the same shape in bfloat16, sampling with the sorting reference in torch, and a decode step of the
1.1B shape (see `decode.py large`), replayed from a graph, with the modules on torch's own kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

import torch
import torch.nn.functional as F
from decode import large_model, quantized

from llmctl.generation.rules import Rules
from llmctl.generation.sampling import Sampler
from llmctl.generation.settings import Sampling, resolve
from llmctl.models.cache import Cache
from llmctl.ops import activation, norm
from llmctl.ops.attention import attention
from llmctl.ops.cached_attention import InBytes
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


def measure_products(bandwidth: float, repeats: int) -> None:
    """A few rows of x times weights in few bits; torch's column is the same in bfloat16."""
    for n_out, n_in in [(2048, 2048), (5632, 2048), (4096, 14336), (28672, 8192)]:
        plain = torch.randn(n_out, n_in, device="cuda").bfloat16()
        for bits, group in [(4, 32), (4, 128), (8, 128)]:
            layer = quantized(torch, (n_out, n_in), bits, group).to("cuda")
            for rows in (1, 8, 32):
                x = torch.randn(rows, n_in, device="cuda").bfloat16()
                os.environ["LLMCTL_KERNELS"] = "cuda"
                ours = milliseconds(lambda layer=layer, x=x: layer(x), repeats)
                theirs = milliseconds(lambda plain=plain, x=x: F.linear(x, plain), repeats)
                share = layer.quantized.nbytes / ours / 1e6 / bandwidth
                row(f"int{bits}-{group} {rows} x {n_in} -> {n_out}", ours, theirs, f"{share:.0%} of copy")


def measure_decoding(kinds: list[str], bandwidth: float, repeats: int) -> None:
    for kind in kinds:
        model, n_bytes = large_model(torch, kind)
        model = model.to("cuda")
        for batch, length in [(1, 512), (8, 512), (32, 2048)]:
            ours, cache = decoding(model, batch, length, "cuda", repeats)
            theirs, _ = decoding(model, batch, length, "reference", repeats)
            n_read = n_bytes + sum(2 * entry.keys[:, :, :length].nbytes for entry in cache.layers)
            how = "" if cache.step is not None and cache.step.is_recorded else ", NO GRAPH"
            more = f"{n_read / ours / 1e6 / bandwidth:.0%} of copy, {1000 * batch / ours:.0f} tokens/s{how}"
            row(f"decode step 1.1B {kind} B{batch} S{length}", ours, theirs, more)


def decoding(model, batch: int, length: int, choice: str, repeats: int) -> tuple[float, Cache]:
    """Milliseconds of the token behind so many, again and again, and the cache."""
    os.environ["LLMCTL_KERNELS"] = choice
    ids_B1 = torch.ones(batch, 1, dtype=torch.int64, device="cuda")
    cache, _ = model.begin([[1]] * batch, [[1]] * batch, length + 8)

    def step() -> None:
        cache.length = length
        model.next_logits(ids_B1, cache)

    return milliseconds(step, repeats), cache


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument(
        "--kinds", nargs="*", default=["bf16", "int4-64", "int8-128"], help="weights of the decode step"
    )
    args = parser.parse_args()
    repeats = args.repeats
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
        codes = torch.randint(0, 256, k.shape, dtype=torch.uint8, device="cuda")
        held = InBytes(codes, torch.rand(k.shape[:3], device="cuda")), InBytes(codes.clone(), k[..., 0].float())
        ours, theirs = both(lambda q=q, held=held, seen=seen: attention(q, *held, seen), repeats)
        share = 2 * codes.numel() * (1 + 4 / 128) / ours / 1e6 / bandwidth
        row("  the same, keys and values in int8", ours, theirs, f"{share:.0%} of copy")
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
    measure_products(bandwidth, repeats)
    measure_decoding(args.kinds, bandwidth, repeats)


if __name__ == "__main__":
    main()
