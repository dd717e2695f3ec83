"""LoRA at the 1.1B shape, rank 16 on q and v, sequence 512, bfloat16: ours against peft over transformers, in turn.

    python tests/bench/finetune.py [--rounds 2] [--steps 3] [--directory /tmp/llmctl-bench]

Each runs in a process of its own on random weights and tokens; the figures are tokens per second of wall clock and of CPU
time (the median step of all rounds) and the largest peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

LENGTH, BATCH, VOCAB = 512, 1, 32000
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
}


def make_base(directory: Path) -> Path:
    import torch
    import transformers

    path = directory / "base"
    if not (path / "config.json").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(path)
    return path


def ours(base: Path):
    import numpy as np
    import torch

    from llmctl import allocator
    from llmctl.data.packing import Batch
    from llmctl.finetune import adapter, methods
    from llmctl.models.loading import load_model
    from llmctl.train import optim
    from llmctl.train.loop import Trainer
    from llmctl.train.objectives import NextToken
    from llmctl.train.schedule import Schedule

    allocator.keep_freed_memory()
    model = load_model(base, torch.bfloat16)
    adapter.attach(model, methods.Lora(rank=16, alpha=32, targets=("q_proj", "v_proj")))
    optimizers = optim.build(model, "adamw", 2e-4, 0.0, (0.9, 0.95), 2e-4)
    schedule = Schedule("cosine", 10, 0.5, 0.0)
    trainer = Trainer(NextToken(model, 0.0), optimizers, schedule, torch.device("cpu"), torch.bfloat16, total_steps=100)
    rng = np.random.default_rng(0)

    def step() -> float:
        ids = rng.integers(0, VOCAB, (BATCH, LENGTH + 1))
        return trainer.step([Batch(ids[:, :-1], ids[:, 1:], None)], BATCH * LENGTH).loss

    return step


def theirs(base: Path):
    import numpy as np
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    rng = np.random.default_rng(0)

    def step() -> float:
        ids = torch.from_numpy(rng.integers(0, VOCAB, (BATCH, LENGTH)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def run_alone(which: str, base: Path, steps: int) -> None:
    step = {"ours": ours, "peft": theirs}[which](base)
    step()
    walls, cpus = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"wall": walls, "cpu": cpus, "peak": peak, "loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/llmctl-bench"))
    parser.add_argument("--base", type=Path, help="A checkpoint of the shape, in place of a random one.")
    parser.add_argument("--alone", choices=["ours", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    base = args.base or make_base(args.directory)
    if args.alone:
        run_alone(args.alone, base, args.steps)
        return
    found: dict[str, list[dict]] = {"peft": [], "ours": []}
    for _ in range(args.rounds):
        for which, runs in found.items():
            command = [sys.executable, __file__, "--alone", which, "--base", str(base), "--steps", str(args.steps)]
            runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    figures = {}
    for which, runs in found.items():
        wall, cpu = (statistics.median(t for run in runs for t in run[kind]) for kind in ("wall", "cpu"))
        peak = max(run["peak"] for run in runs)
        figures[which] = BATCH * LENGTH / wall, BATCH * LENGTH / cpu, peak
        print(f"{which}: {figures[which][0]:.1f} tokens/s, {figures[which][1]:.1f} per CPU second, {peak / 1e9:.2f} GB")
    ratios = [ours_ / peft_ for ours_, peft_ in zip(figures["ours"], figures["peft"])]
    print(
        f"ours / peft: {ratios[0]:.2f} times the tokens/s ({ratios[1]:.2f} by CPU time), {ratios[2]:.2f} of the memory"
    )


if __name__ == "__main__":
    main()
