"""The matrix products of inference against torch's in bfloat16, in alternating calls.

    python tests/bench/linear.py [--threads 2] [--rounds 9] [--rows 1 8 64 512] [--kinds int4-32 int8-128 bf16 float32]

Shapes are those of a 1.1B model. Each call takes another copy of the weights, so that few rows are bound by memory, as in
decoding. Prints medians: GB/s of the weights' bytes and their share of the read bandwidth measured here, TFLOP/s, and how
many times the speed of torch's bfloat16 product ours has; then what rounding the activations adds to the error that rounding
the weights made. LLMCTL_ISA forces an instruction set. OMP_WAIT_POLICY is PASSIVE, as llmctl sets it, or torch's threads
spin through our turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["LLMCTL_KERNELS"] = "cpu"
SHAPES = [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048)]
COPIES_BYTES = 192 << 20  # more than any cache holds for a core


def seconds(calls: dict, rounds: int) -> dict[str, float]:
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def read_bandwidth() -> float:
    """Bytes per second of the fastest of several sums over 512 MiB."""
    import torch

    memory = torch.ones(64 << 20, dtype=torch.int64)
    return memory.nbytes / min(seconds({"sum": lambda i: memory.sum()}, 1)["sum"] for _ in range(5))


def rounded(weight, bits: int, group_size: int):
    """Round to nearest, symmetric, scales in bfloat16."""
    import torch

    from llmctl.ops.quantized_linear import quantized_weight

    groups = weight.unflatten(1, (-1, group_size))
    middle = 1 << (bits - 1)
    scales = (groups.abs().amax(2) / (middle - 1)).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-middle, middle - 1) + middle
    return quantized_weight(codes.flatten(1).to(torch.uint8), scales, None, bits, group_size)


def operands(kind: str, n_out: int, n_in: int):
    """The weights in as many copies as make them cold, their bytes, and the product."""
    import torch

    from llmctl.ops.linear import linear
    from llmctl.ops.quantized_linear import QuantizedWeight, quantized_linear

    name, _, group = kind.partition("-")
    weight = torch.randn(n_out, n_in)
    if name.startswith("int"):
        first = rounded(weight, int(name[3:]), int(group))
        n_bytes = first.nbytes
        copies = [
            QuantizedWeight(first.bits, n_out, n_in, first.unit, first.codes_PB.clone(), first.scales_PBU16.clone())
            for _ in range(max(1, COPIES_BYTES // n_bytes))
        ]
        return copies, n_bytes, quantized_linear, torch.bfloat16
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    weight = weight.to(dtype)
    return [weight.clone() for _ in range(max(1, COPIES_BYTES // weight.nbytes))], weight.nbytes, linear, dtype


def measure(kind: str, shape: tuple[int, int], all_rows: list[int], rounds: int, bandwidth: float) -> None:
    import torch

    n_out, n_in = shape
    weights, n_bytes, product, dtype = operands(kind, n_out, n_in)
    theirs = [torch.randn(n_out, n_in).bfloat16() for _ in range(max(1, COPIES_BYTES // (2 * n_out * n_in)))]
    for rows in all_rows:
        x = torch.randn(rows, n_in).to(dtype)
        x_bf16 = x.bfloat16()
        calls = {
            "ours": lambda i, x=x: product(x, weights[i % len(weights)]),
            "torch": lambda i, x=x_bf16: torch.nn.functional.linear(x, theirs[i % len(theirs)]),
        }
        with torch.inference_mode():
            found = seconds(calls, rounds)
        ours, speed = found["ours"], n_bytes / found["ours"]
        print(
            f"{kind:<10}{f'{n_out}x{n_in}':>12}{rows:>6}{ours * 1e6:>10.0f}{speed / 1e9:>8.1f}{speed / bandwidth:>7.0%}"
            f"{2e-12 * rows * n_in * n_out / ours:>9.3f}{found['torch'] / ours:>9.2f}",
            flush=True,
        )


def print_errors(kinds: list[str]) -> None:
    """Relative to the exact product, for normal weights and activations."""
    import torch

    from llmctl.ops.quantized_linear import dequantized, quantized_linear

    weight, x = torch.randn(1024, 2048), torch.randn(64, 2048)
    exact = x.double() @ weight.double().T
    for kind in kinds:
        name, _, group = kind.partition("-")
        if name.startswith("int"):
            few = rounded(weight, int(name[3:]), int(group))
            by_weights = x.double() @ dequantized(few, torch.float64).T
            errors = (by_weights - exact).norm(), (quantized_linear(x, few).double() - by_weights).norm()
            print(
                f"{kind}: rounding weights {errors[0] / exact.norm():.2e}, activations {errors[1] / exact.norm():.2e}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--kinds", nargs="+", default=["int4-32", "int4-64", "int4-128", "int8-32", "int8-128", "bf16"])
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="indices of the shapes")
    args = parser.parse_args()

    import torch

    from llmctl.ops import native

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"{native.load().llmctl_isa().decode()}, {args.threads} threads, {bandwidth / 1e9:.1f} GB/s read")
    print(f"{'kind':<10}{'weight':>12}{'rows':>6}{'us':>10}{'GB/s':>8}{'share':>7}{'TFLOP/s':>9}{'x torch':>9}")
    for kind in args.kinds:
        for i in args.shapes:
            measure(kind, SHAPES[i], args.rows, args.rounds, bandwidth)
    print_errors(args.kinds)


main()
