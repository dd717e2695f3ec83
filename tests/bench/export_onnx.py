"""An exported model of 1.1B parameters beside that of onnxruntime-genai's own builder: decoding speed, size, and the peak of
memory that the export takes.

    python tests/bench/export_onnx.py prepare DIR [--precision int4]     # random weights, and the model of either
    python tests/bench/export_onnx.py decode DIR [--precision int4] [--threads 2] [--tokens 48] [--rounds 3]

`prepare` prints seconds, size and peak resident memory of each export, a process of its own. `decode` runs, in turn and each time
in a process of its own (the threads of a session that waits would take time from another), ours in llmctl, ours in
onnxruntime-genai, and the builder's in onnxruntime-genai: greedy, one text, the same prompt; it prints medians of tokens per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = list(range(1, 17))
RUNS = {
    "ours in llmctl": ("llmctl", "llmctl"),
    "ours in onnxruntime-genai": ("llmctl", "genai"),
    "the builder's in onnxruntime-genai": ("builder", "genai"),
}
RIVALS = {"int4": "int4", "float32": "fp32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "decode", "one"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=list(RIVALS), default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    {"prepare": prepare, "decode": decode, "one": one}[arguments.what](arguments)


def prepare(arguments) -> None:
    folder, precision = arguments.folder, arguments.precision
    source = folder / "checkpoint"
    if not (source / "config.json").exists():
        import loading

        from llmctl.tokenizer import Tokenizer

        source.mkdir(parents=True, exist_ok=True)
        loading.write(source, "bfloat16", 5e9)
        Tokenizer.bytes().save(source)
    how = ["--quantize", precision] if precision == "int4" else []
    ours, theirs = folder / f"llmctl-{precision}", folder / f"builder-{precision}"
    # random weights of 4 bits are far from those of 16: that is no matter here
    command = [sys.executable, "-m", "llmctl", "export-onnx", source, "-o", ours, "--fuse", *how, "--tolerance", "10"]
    if not ours.exists():
        measured("llmctl", [*map(str, command), "--overwrite"], ours, source)
    names = ["-i", source, "-o", theirs, "-p", RIVALS[precision], "-e", "cpu", "-c", folder / "cache"]
    measured("builder", [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, names)], theirs, source)


def measured(name: str, command: list[str], output: Path, source: Path) -> None:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}: ended with {status}")
    size = sum(path.stat().st_size for path in output.iterdir() if "onnx" in path.name)
    read, peak = (source / "model.safetensors").stat().st_size, usage.ru_maxrss * 1024
    print(
        f"{name}: {time.perf_counter() - start:.0f} s, {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB "
        f"({peak / size:.2f} x what it wrote, {peak / read:.2f} x what it read)"
    )


def decode(arguments) -> None:
    found: dict[str, list[float]] = {name: [] for name in RUNS}
    for number in range(arguments.rounds):
        for name in RUNS if number % 2 == 0 else reversed(RUNS):
            again = [sys.executable, __file__, "one", *sys.argv[2:], "--run", name]
            found[name].append(float(subprocess.run(again, stdout=subprocess.PIPE, check=True).stdout))
    for name, rates in found.items():
        print(f"{name}: {statistics.median(rates):.2f} tokens/s ({', '.join(f'{rate:.2f}' for rate in rates)})")


def one(arguments) -> None:
    who, runner = RUNS[arguments.run]
    run = {"llmctl": in_llmctl, "genai": in_genai}[runner](arguments.folder / f"{who}-{arguments.precision}", arguments)
    run()
    print(run())


def in_llmctl(folder: Path, arguments):
    import torch

    torch.set_num_threads(arguments.threads)
    from llmctl.run_onnx.opening import open_model

    model = open_model(folder, "cpu")

    def run() -> float:
        cache, inputs_BT = model.begin([PROMPT], [PROMPT], arguments.tokens + 1)
        token = model.next_logits(inputs_BT, cache).argmax(-1)
        start = time.perf_counter()
        for _ in range(arguments.tokens):
            token = model.next_logits(token[:, None], cache).argmax(-1)
        return arguments.tokens / (time.perf_counter() - start)

    return run


def in_genai(folder: Path, arguments):
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(
        f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {arguments.threads}}}}}}}}}'
    )
    model = genai.Model(config)

    def run() -> float:
        settings = genai.GeneratorParams(model)
        length = len(PROMPT) + arguments.tokens + 1
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(PROMPT)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(arguments.tokens):
            generator.generate_next_token()
        return arguments.tokens / (time.perf_counter() - start)

    return run


if __name__ == "__main__":
    main()
