"""Tokens per second of whole models: a tiny one, bound by whatever is not arithmetic, and the 1.1B shape, bound by memory.

    python tests/bench/decode.py small MODEL [--run-c run] [--rounds 5]
    python tests/bench/decode.py large [--kinds int4-64 int8-128 bf16] [--batch 1 8] [--prompt 512] [--new 64]

`small` writes 256 tokens with MODEL (a Llama checkpoint, such as stories260K) through a Session, text and all, through
transformers' generate, and, given its binary, through llama2.c's run. `large` has random weights: 22 layers, d_model 2048,
32 heads, 4 kv heads, d_ff 5632, vocabulary 32000. One run after the other in turn; prints medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("LLMCTL_KERNELS", "cpu")
N_TOKENS, PROMPT = 256, "Once upon a time"
LARGE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    which = parser.add_subparsers(dest="which", required=True)
    small = which.add_parser("small")
    small.add_argument("model", type=Path)
    small.add_argument("--run-c", type=Path)
    large = which.add_parser("large")
    large.add_argument("--kinds", nargs="+", default=["int4-64", "int8-128", "bf16"])
    large.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    large.add_argument("--prompt", type=int, default=512)
    large.add_argument("--new", type=int, default=64)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    {"small": measure_small, "large": measure_large}[args.which](torch, args)


def measure_small(torch, args) -> None:
    import transformers

    from llmctl.generation.session import Session
    from llmctl.generation.settings import Sampling

    transformers.logging.set_verbosity_error()
    session = Session.open(args.model, "float32", "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = torch.tensor([session.tokenizer.encode(PROMPT)])
    settings = Sampling(temperature=0.0, max_new_tokens=N_TOKENS, ignore_eos=True)

    def ours() -> float:
        start = time.perf_counter()
        completion = session.begin(PROMPT, settings)
        for _ in session.stream(completion):
            pass
        return len(completion.ids) / (time.perf_counter() - start)

    def transformers_() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            found = theirs.generate(
                ids, max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, do_sample=False, pad_token_id=0
            )
        return (found.shape[1] - ids.shape[1]) / (time.perf_counter() - start)

    ways = {"llmctl": ours, "transformers": transformers_}
    with tempfile.TemporaryDirectory() as directory:
        if args.run_c:
            model, tokenizer = write_for_run_c(session, Path(directory))
            command = [args.run_c.resolve(), model, "-z", tokenizer, "-t", "0", "-n", str(N_TOKENS), "-i", PROMPT]
            ways["run.c"] = lambda: rate_of_run_c(command)
        found = {name: [] for name in ways}
        for _ in range(args.rounds + 1):
            for name, way in ways.items():
                found[name].append(way())
    rates = {name: statistics.median(values[1:]) for name, values in found.items()}
    for name, rate in rates.items():
        print(f"{name:<14}{rate:>9.0f} tokens/s{rates['llmctl'] / rate:>8.1f} x")


def rate_of_run_c(command) -> float:
    result = subprocess.run(command, capture_output=True, check=True)
    return float(re.search(rb"achieved tok/s: ([\d.]+)", result.stderr + result.stdout)[1])


def write_for_run_c(session, directory: Path) -> tuple[Path, Path]:
    """The checkpoint in llama2.c's first format, whose rotations pair neighbours, and a tokenizer."""
    config, weights = session.model.config, session.model.state_dict()
    mixer = config.block(0).mixer
    context, half = 256 + 16, mixer.head_dim // 2
    sizes = (config.d_model, config.block(0).ffn.d_ff, config.n_layers, mixer.n_heads, mixer.n_kv_heads)
    layers = range(config.n_layers)

    def paired(name: str):
        return weights[name].unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)

    def each(name: str, change=weights.__getitem__):
        return [change(f"layers.{i}.{name}.weight") for i in layers]

    tensors = [weights["embed_tokens.weight"], *each("mixer_norm"), *each("mixer.q_proj", paired)]
    tensors += [*each("mixer.k_proj", paired), *each("mixer.v_proj"), *each("mixer.o_proj"), *each("ffn_norm")]
    tensors += [*each("ffn.gate_proj"), *each("ffn.down_proj"), *each("ffn.up_proj"), weights["norm.weight"]]
    model, tokenizer = directory / "model.bin", directory / "tokenizer.bin"
    with model.open("wb") as file:
        file.write(struct.pack("7i", *sizes, config.vocab_size, context))
        for tensor in tensors:
            file.write(tensor.float().contiguous().numpy().tobytes())
        file.write(bytes(4 * 2 * context * half))  # tables that it does not read any more
    with tokenizer.open("wb") as file:
        file.write(struct.pack("i", 64))
        for token in range(config.vocab_size):
            text = session.tokenizer.token_bytes(token)
            file.write(struct.pack("fi", -token, len(text)) + text)
    return model, tokenizer


def measure_large(torch, args) -> None:
    from llmctl.generation.completion import Completion
    from llmctl.generation.decode import decode
    from llmctl.generation.settings import Sampling, resolve

    print(f"{'weights':<10}{'batch':>6}{'prompt tokens/s':>17}{'decode tokens/s':>17}{'GB/s':>7}")
    for kind in args.kinds:
        model, n_bytes = large_model(torch, kind)
        for batch in args.batch:
            rates = []
            for _ in range(args.rounds):
                settings = resolve(Sampling(temperature=0.0, max_new_tokens=args.new + 1, ignore_eos=True))
                prompts = [[1 + (i * 7 + j) % 31000 for j in range(args.prompt)] for i in range(batch)]
                completions = [Completion(prompt, settings, i, args.new + 1) for i, prompt in enumerate(prompts)]
                times = [time.perf_counter()]
                times += [time.perf_counter() for _ in decode(model, completions)]
                steps = [after - before for before, after in zip(times, times[1:])]
                rates.append((batch * args.prompt / steps[0], 1 / statistics.median(steps[1:])))
            prompt, steps = (statistics.median(values) for values in zip(*rates))
            print(f"{kind:<10}{batch:>6}{prompt:>17.0f}{batch * steps:>17.1f}{n_bytes * steps / 1e9:>7.1f}", flush=True)


def large_model(torch, kind: str):
    """The model, and how many bytes of weights a token meets."""
    from llmctl.models import families
    from llmctl.models.linear import Linear
    from llmctl.models.loading import new_empty, reset_buffers

    with torch.device("meta"):
        model = new_empty(families.find("llama").config_from_hf(LARGE))
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    reset_buffers(model)
    pattern = (torch.randn(1 << 20) * 0.02).bfloat16()
    n_bytes = 0
    for name, module in list(model.named_modules()):
        if type(module) is not Linear:
            continue
        if kind == "bf16":
            fill(module.weight.data, pattern)
            n_bytes += module.weight.nbytes
            continue
        bits, group = (int(word) for word in kind.removeprefix("int").split("-"))
        owner, _, leaf = name.rpartition(".")
        module = quantized(torch, module.weight.shape, bits, group)
        n_bytes += module.quantized.nbytes
        setattr(model.get_submodule(owner), leaf, module)
    fill(model.embed_tokens.weight.data, pattern)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
    return model, n_bytes


def fill(weight, pattern) -> None:
    flat = weight.view(-1)
    for start in range(0, len(flat), len(pattern)):
        flat[start : start + len(pattern)] = pattern[: len(flat) - start]


def quantized(torch, shape, bits: int, group: int):
    from llmctl.models.packed import AffineWeight
    from llmctl.models.quantized_linear import QuantizedLinear

    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    scales = torch.full((shape[0], -(-shape[1] // group)), 0.02 / (1 << (bits - 2))).half()
    return QuantizedLinear(AffineWeight(codes, scales, None, bits, group), None, torch.bfloat16)


if __name__ == "__main__":
    main()
