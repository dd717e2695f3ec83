"""`llmctl merge-lora` against peft's load, merge_and_unload and save_pretrained, as whole processes in turn.

    python tests/bench/merge.py [--rounds 3] [--directory /tmp/llmctl-bench]

A random 1.1B llama in bfloat16 with LoRA of rank 16 on q and v. Seconds of wall clock (the least of the rounds), the peak of
all resident memory (mapped pages of files count), and the peak of anonymous memory, which nothing can take back (looked at
every 5 ms). Ours also checks what it wrote against base and adapter, and records the sha256 of both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from finetune import make_base

THEIRS = """
import sys, torch, peft, transformers
base, adapter, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def make_adapter(base: Path, directory: Path) -> Path:
    import peft
    import torch
    import transformers

    path = directory / "adapter"
    if not (path / "adapter_config.json").exists():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(path)
    return path


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measured(command: list[str]) -> tuple[float, float, float]:
    """(seconds, peak of resident bytes, peak of anonymous bytes) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [0]

    def watch() -> None:
        while process.returncode is None:
            peaks[0] = max(peaks[0], anonymous_bytes(process.pid))
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(said.decode())
    return time.perf_counter() - began, usage.ru_maxrss * 1024, peaks[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/llmctl-bench"))
    args = parser.parse_args()
    base = make_base(args.directory)
    adapter = make_adapter(base, args.directory)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    output = args.directory / "merged"
    commands = {
        "peft": [sys.executable, "-c", THEIRS, str(base), str(adapter), str(output)],
        "ours": [sys.executable, "-m", "llmctl", "merge-lora", str(base), str(adapter), "-o", str(output)],
    }
    runs: dict[str, list[tuple[float, float, float]]] = {which: [] for which in commands}
    for _ in range(args.rounds):
        for which, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            runs[which].append(measured(command))
    shutil.rmtree(output, ignore_errors=True)
    least = {which: min(run[0] for run in found) for which, found in runs.items()}
    for which, found in runs.items():
        resident, anonymous = (max(run[i] for run in found) for i in (1, 2))
        seconds = ", ".join(f"{run[0]:.1f}" for run in found)
        print(
            f"{which}: {seconds} s; peak {resident / 1e9:.2f} GB resident ({resident / size:.1%} of the model's "
            f"{size / 1e9:.2f} GB), {anonymous / 1e9:.2f} GB anonymous ({anonymous / size:.1%})"
        )
    print(f"ours / peft: {least['ours'] / least['peft']:.2f} of the time")


if __name__ == "__main__":
    main()
