"""From a checkpoint of 1.1B parameters to its first token: this package and transformers, in alternating processes.

    python tests/bench/loading.py [--checkpoint DIR] [--dtype bfloat16] [--shard-mb MB] [--rounds 5]

Without a checkpoint one with random weights is written first (2.2 GB in bfloat16). Prints medians, with the file in the
page cache: seconds of the imports, of loading with a first token after a prompt of 8, and CPU seconds; the peak of
resident memory (mapped pages of the file count) and its anonymous part, in GB and relative to the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
PROMPT = list(range(1, 9))
COLUMNS = ("import", "first token", "its CPU", "CPU in all", "peak GB", "of file", "anonymous GB")


def write(directory: Path, dtype_name: str, shard_bytes: float) -> None:
    """A checkpoint of random weights, one tensor in memory at a time."""
    import torch

    from llmctl import checkpoint
    from llmctl.models import families, loading
    from llmctl.tensor_file import LazyTensor

    dtype = getattr(torch, dtype_name)
    config = families.find(SHAPE["model_type"]).config_from_hf(SHAPE)
    with torch.device("meta"):
        shapes = loading.hf_tensors(config, dict(loading.new_empty(config).named_parameters()))

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, dtype, lambda: (torch.randn(shape) * 0.02).to(dtype))

    loading.write_config(config, dtype, directory)
    tensors = {name: lazy(tuple(tensor.shape)) for name, tensor in shapes.items()}
    checkpoint.save_tensors(directory, tensors, shard_bytes)


def llmctl_token(path: str):
    from llmctl.generation.complete import complete, prepare
    from llmctl.generation.settings import Sampling, resolve
    from llmctl.models.loading import load_model

    def run() -> int:
        model = load_model(path)
        completion = prepare(model, PROMPT, resolve(Sampling(max_new_tokens=1, temperature=0.0, seed=0)))
        return next(complete(model, [completion], 1)).ids[0]

    return run


def transformers_token(path: str):
    import torch
    from transformers import LlamaForCausalLM

    def run() -> int:
        model = LlamaForCausalLM.from_pretrained(path, dtype="auto")
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=1, do_sample=False)
        return int(ids[0, -1])

    return run


PROGRAMS = {"llmctl": llmctl_token, "transformers": transformers_token}


def child(name: str, path: str) -> None:
    """One measurement, in a process of its own; a line of JSON."""
    began = time.perf_counter()
    run = PROGRAMS[name](path)
    ready, cpu = time.perf_counter(), time.process_time()
    token = run()
    result = {"import": ready - began, "first token": time.perf_counter() - ready}
    result |= {"its CPU": time.process_time() - cpu, "CPU in all": time.process_time()}
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    for column, key in (("peak GB", "VmHWM"), ("anonymous GB", "RssAnon")):
        result[column] = int(status[key].split()[0]) * 1024 / 1e9
    print(json.dumps({**result, "token": token}))


def measure(path: Path, rounds: int) -> dict[str, list[dict]]:
    """The programs take turns, so that a busy moment of the machine meets both; a first round fills the cache."""
    results = {name: [] for name in PROGRAMS}
    for _ in range(rounds + 1):
        for name, found in results.items():
            command = [sys.executable, __file__, "--child", name, "--checkpoint", str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    return {name: found[1:] for name, found in results.items()}


def report(path: Path, results: dict[str, list[dict]]) -> None:
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e9
    assert len({run["token"] for runs in results.values() for run in runs}) == 1, "the programs disagree"
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    print(f"{size:.2f} GB in {len(list(path.glob('*.safetensors')))} file(s)")
    print(f"{'':<14}" + "".join(f"{column:>14}" for column in COLUMNS))
    for name, found in medians.items():
        found["of file"] = found["peak GB"] / size
        print(f"{name:<14}" + "".join(f"{found[column]:>14.2f}" for column in COLUMNS))
    ratio = medians["transformers"]["first token"] / medians["llmctl"]["first token"]
    print(f"llmctl's first token comes {ratio:.1f} times as soon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shard-mb", type=float, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, str(options.checkpoint))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = options.checkpoint or Path(directory)
        if not options.checkpoint:
            write(path, options.dtype, options.shard_mb * 1e6)
        report(path, measure(path, options.rounds))


if __name__ == "__main__":
    main()
