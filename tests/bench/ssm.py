"""Training and decoding with state spaces: ours and transformers' plain torch, the same weights, in turn.

    python tests/bench/ssm.py [--family mamba mamba2] [--batch 2] [--seq-len 256] [--threads 1] [--rounds 2]

One forward and backward pass over all tokens, float32, in CPU seconds and wall seconds; tokens per second of decoding after a
prompt, one text; and the growth of peak memory that a pass over one long text takes in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from llmctl.allocator import keep_freed_memory
from llmctl.models import shapes
from llmctl.models.cache import Cache
from llmctl.models.config import parameter_count
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model, save_model

VOCABULARY = 4096
LONG = 512


def models(family: str, n_parameters: int, folder: Path):
    config = shapes.for_parameters(family, n_parameters, VOCABULARY, 256)
    model = new_model(config, seed=0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_model(model, folder)
    print(f"{family}: {parameter_count(config):,} parameters, {config.n_layers} layers, d_model {config.d_model}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {"llmctl": load_model(folder), "transformers": theirs}


def logits(model, ids_BT: torch.Tensor) -> torch.Tensor:
    out = model(ids_BT)
    return getattr(out, "logits", out)


def trained(model, ids_BT: torch.Tensor) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one step."""
    model.train()
    cpu, wall = time.process_time(), time.perf_counter()
    logits(model, ids_BT).logsumexp(-1).mean().backward()
    spent = time.process_time() - cpu, time.perf_counter() - wall
    model.zero_grad(set_to_none=True)
    return spent


@torch.inference_mode()
def decoded(model, n_tokens: int) -> float:
    """CPU seconds per token, after a prompt of 16."""
    model.eval()
    ids_BT = torch.zeros(1, 16, dtype=torch.long)
    if isinstance(model, transformers.PreTrainedModel):
        out = model(ids_BT, use_cache=True)
        began = time.process_time()
        for _ in range(n_tokens):
            out = model(ids_BT[:, :1], cache_params=out.cache_params, use_cache=True)
    else:
        cache = Cache(model.config, 1, 16 + n_tokens)
        model(ids_BT, cache=cache)
        began = time.process_time()
        for _ in range(n_tokens):
            model(ids_BT[:, :1], cache=cache)
    return (time.process_time() - began) / n_tokens


def memory_growth(which: str, folder: Path) -> None:
    """For a process of its own: prints the megabytes that a training pass over one long text adds to the peak."""
    model = load_model(folder) if which == "llmctl" else transformers.AutoModelForCausalLM.from_pretrained(folder)
    logits(model.train(), torch.zeros(1, 8, dtype=torch.long)).mean().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
    before = _peak_kib()
    logits(model, torch.zeros(1, LONG, dtype=torch.long)).logsumexp(-1).mean().backward()
    print((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def compare(family: str, args, folder: Path) -> None:
    both = models(family, args.params, folder)
    ids_BT = torch.randint(0, VOCABULARY, (args.batch, args.seq_len))
    with torch.no_grad():
        print(
            f"  largest difference of logits {(logits(both['llmctl'], ids_BT) - logits(both['transformers'], ids_BT)).abs().max():.1e}"
        )
    for model in both.values():
        trained(model, ids_BT)
    rounds = [{name: trained(model, ids_BT) for name, model in both.items()} for _ in range(args.rounds)]
    cpu, wall = ({name: min(r[name][i] for r in rounds) for name in both} for i in (0, 1))
    steps = [{name: decoded(model, 32) for name, model in both.items()} for _ in range(args.rounds)]
    step = {name: min(r[name] for r in steps) for name in both}
    peak = {name: float(_in_own_process("--memory", name, str(folder))) for name in both}
    for title, values, scale, unit in (
        ("training step", cpu, 1, "s CPU"),
        ("training step", wall, 1, "s wall"),
        ("decoding a token", step, 1e3, "ms CPU"),
        (f"{LONG} tokens, memory", peak, 1, "MB"),
    ):
        a, b = values["llmctl"] * scale, values["transformers"] * scale
        print(f"  {title:>22}  llmctl {a:8.2f}  transformers {b:8.2f} {unit}  ratio {b / a:.1f}", flush=True)


def _in_own_process(*args: str) -> str:
    return subprocess.run([sys.executable, __file__, *args], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=["mamba", "mamba2"])
    parser.add_argument("--params", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.memory:
        memory_growth(args.memory[0], Path(args.memory[1]))
        return
    keep_freed_memory()
    for family in args.family:
        with tempfile.TemporaryDirectory() as folder:
            compare(family, args, Path(folder))


if __name__ == "__main__":
    main()
