"""Speed of exported C programs against llama2.c's run.c, with the same compiler, flags, weights and greedy tokens.

    python tests/bench/export_c.py LLAMA2C [--model DIR] [--rounds 5] [--threads 1]

LLAMA2C is a clone of https://github.com/karpathy/llama2.c, bare or not; its run.c reads the same weights in its own form.
Models: `--model`, a Llama of few parameters (stories260K by default), and one of 15M parameters (dim 288, 6 layers, vocabulary 32000) with
random weights, which cost what trained ones do. Alternating runs; prints medians in tokens/s, after the prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import struct
import subprocess
import tempfile
from pathlib import Path

FLAGS = {"-O3": ["-O3"], "-Ofast -march=native": ["-Ofast", "-march=native"]}
STORIES = Path(os.environ.get("LLMCTL_DATA", "../shared/data"), "models", "stories260K")
SHAPE = {
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama2c", type=Path)
    parser.add_argument("--model", type=Path, default=STORIES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for name in ("run.c", "tokenizer.model"):
            (work / name).write_bytes(from_git(args.llama2c, name))
        for name, model, steps in (("small", args.model, 200), ("15M", new_model(work / "new", work), 200)):
            export(model, work / name)
            for label, flags in FLAGS.items():
                print(
                    f"{name}, {label}, {args.threads} threads: {compared(work, name, flags, args, steps)}", flush=True
                )


def from_git(repository: Path, name: str) -> bytes:
    return subprocess.run(["git", "-C", repository, "show", f"HEAD:{name}"], check=True, capture_output=True).stdout


def new_model(directory: Path, work: Path) -> Path:
    import torch

    from llmctl.models.loading import new_empty, read_config, save_model
    from llmctl.tokenizer import Tokenizer

    directory.mkdir()
    tokenizer = Tokenizer.load(work / "tokenizer.model")
    shape = {"model_type": "llama", "vocab_size": tokenizer.vocab_size, **SHAPE}
    (directory / "config.json").write_text(json.dumps(shape))
    model = new_empty(read_config(directory))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


def export(model: Path, output: Path) -> None:
    from llmctl.export.c.export import export as export_c
    from llmctl.export.c.settings import ExportCSettings

    for kind in ("f32", "int8"):
        export_c(model, output.with_name(f"{output.name}-{kind}"), ExportCSettings(type=kind))
    write_rival(model, output)


def write_rival(model: Path, output: Path) -> None:
    """NAME.bin and NAME.tokens, as llama2.c's run.c reads them: neighbours turn together, not halves of a head."""
    from llmctl.models.loading import load_model
    from llmctl.tokenizer import Tokenizer

    loaded = load_model(model, "float32")
    config, weights = loaded.config, dict(loaded.named_parameters())
    mixer, d_ff = config.blocks[0].mixer, config.blocks[0].ffn.d_ff
    turned = ("q_proj", "k_proj")
    names = ["mixer_norm", *(f"mixer.{part}_proj" for part in "qkvo"), "ffn_norm"]
    names += [f"ffn.{part}_proj" for part in ("gate", "down", "up")]
    with open(output.with_suffix(".bin"), "wb") as file:
        heads = (config.n_layers, mixer.n_heads, mixer.n_kv_heads)
        file.write(struct.pack("<7i", config.d_model, d_ff, *heads, config.vocab_size, config.max_positions))
        file.write(weights["embed_tokens.weight"].detach().numpy().tobytes())
        for name in names:
            for layer in range(config.n_layers):
                weight = weights[f"layers.{layer}.{name}.weight"].detach()
                if name.endswith(turned):
                    halves = weight.unflatten(0, (-1, 2, mixer.head_dim // 2))
                    weight = halves.transpose(1, 2).flatten(0, 2)
                file.write(weight.contiguous().numpy().tobytes())
        file.write(weights["norm.weight"].detach().numpy().tobytes())
        file.write(bytes(4 * config.max_positions * mixer.head_dim))
    tokenizer = Tokenizer.load(model)
    spec = json.loads(tokenizer.json)["model"]
    ranks = {
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", ""): -i for i, pair in enumerate(spec["merges"])
    }
    with open(output.with_suffix(".tokens"), "wb") as file:
        file.write(struct.pack("<i", max(len(token.encode()) for token in spec["vocab"])))
        for token in sorted(spec["vocab"], key=spec["vocab"].get):
            text = token.replace("▁", " ").encode()
            file.write(struct.pack("<fi", ranks.get(token, -1e9), len(text)) + text)


def compared(work: Path, name: str, flags: list[str], args, steps: int) -> str:
    compile_ = ["cc", *flags, *(["-fopenmp"] if args.threads > 1 else [])]
    subprocess.run([*compile_, "-w", "-o", work / "rival", work / "run.c", "-lm"], check=True)
    subprocess.run([*compile_, "-o", work / "ours", work / f"{name}-f32" / "run.c", "-lm"], check=True)
    rival = [work / "rival", work / f"{name}.bin", "-z", work / f"{name}.tokens", "-t", "0", "-i", "Once upon a time"]
    calls = {"llama2.c": [*rival, "-n", str(steps)]}
    for kind in ("f32", "int8"):
        ours = [work / "ours", work / f"{name}-{kind}" / "model.bin", "Once upon a time", "--temp", "0"]
        calls[kind] = [*ours, "--ignore-eos", "-n", str(steps - 5), "--stats"]
    found = {who: [] for who in calls}
    for _ in range(args.rounds):
        for who, command in calls.items():
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
            speed = re.search(r"([\d.]+) tokens/s|tok/s: ([\d.]+)", result.stderr)
            found[who].append(float(speed[1] or speed[2]))
    medians = {who: statistics.median(values) for who, values in found.items()}
    figures = ", ".join(f"{who} {speed:,.0f}" for who, speed in medians.items())
    ratios = " and ".join(f"{medians[kind] / medians['llama2.c']:.2f}" for kind in ("f32", "int8"))
    return f"tokens/s: {figures}; f32 and int8 are {ratios} x llama2.c"


if __name__ == "__main__":
    main()
