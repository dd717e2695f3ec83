"""Prompt and decoding of a 1.1B Llama of random weights on a CPU: ours through generation's own loop, then others, in turn.

    python tests/bench/inference.py [--rivals PYTHON] [--kinds int4-32 int8-128 bf16] [--threads 2] [--rounds 3] [--skip-ours]
    python tests/bench/inference.py --rivals PYTHON --models DIR [--only openvino genai] [--skip-ours]

PYTHON is an interpreter with llama-cpp-python, gguf, openvino-genai and onnxruntime-genai; without one ours alone is measured.
llama.cpp's weights are written below the directory of temporary files (1.8 GB). The other two need real files: DIR keeps them from
one call to the next, made of a checkpoint of the same shape (`--layers` changes it): `export-gguf --type q4_0` for OpenVINO
GenAI, which reads .gguf, and onnxruntime-genai's own builder's int4 model (8 GB of memory), of `--builder PYTHON` where that has
torch and is not this one. Ours is `decode.py large`, with batches of 1 and 8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE.parent / "programs"
OTHERS = ("llama.cpp", "openvino", "genai")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", "--llama-cpp", metavar="PYTHON")
    parser.add_argument("--models", metavar="DIR", type=Path)
    parser.add_argument("--builder", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--only", nargs="+", choices=OTHERS, default=OTHERS)
    parser.add_argument("--kinds", nargs="+", default=["int4-32", "int4-64", "int8-128", "bf16"])
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0"])
    parser.add_argument("--batch", nargs="+", default=["1", "8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--layers", type=int, default=22, help="of the others' models")
    parser.add_argument("--skip-ours", action="store_true")
    args = parser.parse_args()

    counts = ["--threads", str(args.threads), "--rounds", str(args.rounds)]
    sizes = ["--prompt", str(args.prompt), "--new", str(args.new)]
    if not args.skip_ours:
        large = ["large", "--kinds", *args.kinds, "--batch", *args.batch, *sizes]
        subprocess.run([sys.executable, HERE / "decode.py", *counts, *large], check=True)
    if args.rivals is None:
        return
    print(f"{'':<24}{'prompt tokens/s':>17}{'decode tokens/s':>17}{'eight at once':>15}", flush=True)
    if "llama.cpp" in args.only:
        with tempfile.TemporaryDirectory() as directory:
            for kind in args.types:
                show(args, f"llama.cpp {kind}", "llama_cpp_speed.py", directory, kind, args.layers)
    if args.models is not None and "openvino" in args.only:
        show(args, "OpenVINO GenAI q4_0", "openvino_speed.py", gguf_of(args))
    if args.models is not None and "genai" in args.only:
        show(args, "onnxruntime-genai int4", "genai_speed.py", built_by_genai(args))


def show(args, name: str, program: str, *words) -> None:
    numbers = [args.prompt, args.new, args.threads, args.rounds]
    command = [args.rivals, PROGRAMS / program, *words, *numbers]
    result = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True)
    rates = json.loads(result.stdout.splitlines()[-1])
    together = f"{rates['decode_8']:>15.1f}" if "decode_8" in rates else ""
    print(f"{name:<24}{rates['prompt']:>17.0f}{rates['decode']:>17.1f}{together}", flush=True)


def checkpoint_of(args) -> Path:
    """Random bfloat16 weights of the shape, with a small tokenizer of a kind that all can read."""
    import loading

    from llmctl.tokenizer import Tokenizer

    directory = args.models / f"checkpoint-{args.layers}"
    if not (directory / "model.safetensors").exists():
        directory.mkdir(parents=True, exist_ok=True)
        loading.SHAPE["num_hidden_layers"] = args.layers
        loading.write(directory, "bfloat16", 5e9)
        Tokenizer.train_bpe([__doc__], 300).save(directory)
    return directory


def gguf_of(args) -> Path:
    path = args.models / f"q4_0-{args.layers}.gguf"
    if not path.exists():
        # random weights of 4 bits are far from those of 16: that is no matter here
        words = ["export-gguf", checkpoint_of(args), "--type", "q4_0", "--tolerance", "100", "-o", path]
        subprocess.run([sys.executable, "-m", "llmctl", *map(str, words)], stdout=subprocess.DEVNULL, check=True)
    return path


def built_by_genai(args) -> Path:
    path = args.models / f"builder-int4-{args.layers}"
    if not (path / "genai_config.json").exists():
        words = ["-i", checkpoint_of(args), "-o", path, "-p", "int4", "-e", "cpu", "-c", args.models / "cache"]
        command = [args.builder, "-m", "onnxruntime_genai.models.builder", *map(str, words)]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )  # a line for each node
        if done.returncode:
            sys.exit(f"{done.stderr[-2000:]}\nthe builder of onnxruntime-genai ended with {done.returncode}")
    return path


main()
