"""Prompt and decoding of a 1.1B Llama of random weights on a CPU: ours through generation's own loop, then llama.cpp, in turn.

    python tests/bench/inference.py [--llama-cpp PYTHON] [--kinds int4-32 int8-128 bf16] [--threads 2] [--rounds 3] [--skip-ours]

PYTHON is an interpreter with llama-cpp-python and gguf; without one llama.cpp is left out. Its weights are written below the
directory of temporary files (1.8 GB). Ours is `decode.py large`, with batches of 1 and 8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LLAMA_CPP = HERE.parent / "programs" / "llama_cpp_speed.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--kinds", nargs="+", default=["int4-32", "int4-64", "int8-128", "bf16"])
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0"])
    parser.add_argument("--batch", nargs="+", default=["1", "8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--layers", type=int, default=22, help="of llama.cpp's model")
    parser.add_argument("--skip-ours", action="store_true")
    args = parser.parse_args()

    counts = ["--threads", str(args.threads), "--rounds", str(args.rounds)]
    sizes = ["--prompt", str(args.prompt), "--new", str(args.new)]
    if not args.skip_ours:
        large = ["large", "--kinds", *args.kinds, "--batch", *args.batch, *sizes]
        subprocess.run([sys.executable, HERE / "decode.py", *counts, *large], check=True)
    if args.llama_cpp is None:
        return
    with tempfile.TemporaryDirectory() as directory:
        for kind in args.types:
            numbers = [args.layers, args.prompt, args.new, args.threads, args.rounds]
            command = [args.llama_cpp, LLAMA_CPP, directory, kind, *map(str, numbers)]
            result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rates = json.loads(result.stdout.splitlines()[-1])
            print(f"{'llama.cpp ' + kind:<16}{rates['prompt']:>17.0f}{rates['decode']:>17.1f}", flush=True)


main()
