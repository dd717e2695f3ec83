"""Fine-tuning under torchrun: what two processes leave is what one leaves."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
transformers = pytest.importorskip("transformers")

from llmctl.checkpoint import open_tensors  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

FLAGS = ("--steps", "4", "--seq-len", "32", "--batch-size", "4", "--precision", "fp32", "--log-every", "1")
CONFIGS = {
    "llama": lambda v: transformers.LlamaConfig(
        vocab_size=v,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    ),
    "gpt2": lambda v: transformers.GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "roberta": lambda v: transformers.RobertaConfig(
        vocab_size=v,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory, tokenizer = tmp_path_factory.mktemp("bases"), Tokenizer.bytes()
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        config = config(tokenizer.vocab_size)
        kind = transformers.AutoModelForMaskedLM if family == "roberta" else transformers.AutoModelForCausalLM
        model = kind.from_config(config)
        model.save_pretrained(directory / family)
        tokenizer.save(directory / family)
    return directory


def rows(path, **forms):
    path.write_text("".join(json.dumps({key: make(i) for key, make in forms.items()}) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    ask = {"prompt": lambda i: f"{i} + 1 = "}
    return {
        "sft": rows(directory / "sft.jsonl", **ask, completion=lambda i: str(i + 1)),
        "dpo": rows(directory / "dpo.jsonl", **ask, chosen=lambda i: str(i + 1), rejected=lambda i: str(i - 1)),
        "regress": rows(directory / "regress.jsonl", text=lambda i: "x" * (i % 9 + 1), label=lambda i: 10.0 + i % 9),
    }


def run(processes, *words, cwd):
    command = [sys.executable, "-m"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port), "-m"]
    command += ["llmctl", "finetune", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done


CASES = {
    "lora": ("llama", "sft", ["--lora-rank", "4", "--targets", "all-linear", "--modules-to-save", "norm"]),
    "shared": ("gpt2", "sft", []),
    "dora": ("llama", "sft", ["--lora-rank", "4", "--dora"]),
    "pissa": ("llama", "sft", ["--lora-init", "pissa", "--lora-rank", "4"]),
    "embeddings": ("llama", "sft", ["--lora-rank", "4", "--targets", "embed_tokens"]),
    "adapter": ("llama", "sft", ["--method", "adapter", "--adapter-width", "5"]),
    "ia3": ("llama", "sft", ["--method", "ia3"]),
    "prompt": ("llama", "sft", ["--method", "prompt", "--virtual-tokens", "3"]),
    "prefix": ("llama", "sft", ["--method", "prefix", "--virtual-tokens", "3"]),
    "full": ("llama", "sft", ["--method", "full"]),
    "dpo": ("llama", "dpo", ["--lora-rank", "4", "--objective", "dpo"]),
    "regress": ("llama", "regress", ["--lora-rank", "4", "--objective", "regress"]),
    "means": ("roberta", "regress", ["--method", "full", "--objective", "regress", "--pooling", "mean"]),
    "means-lora": ("roberta", "regress", ["--objective", "regress", "--pooling", "mean"]),
}
QUICK = ("shared",)


@pytest.mark.parametrize(
    "case", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in CASES]
)
def test_two_processes_leave_what_one_leaves(bases, data, tmp_path, case):
    family, rows_, flags = CASES[case]
    for processes in (1, 2):
        run(processes, bases / family, data[rows_], "-o", f"out{processes}", *flags, *FLAGS, cwd=tmp_path)
    is_adapter = (tmp_path / "out1" / "adapter_config.json").exists()
    one, two = (open_tensors(tmp_path / f"out{n}", stem="adapter_model" if is_adapter else "model") for n in (1, 2))
    assert list(one) == list(two)
    for name in one:
        assert one.shape(name) == two.shape(name)
        # the steps are of 2e-2, and AdamW magnifies the last bits of the smallest gradients
        torch.testing.assert_close(two.get(name), one.get(name), atol=2e-4, rtol=1e-3)
    validated = [_validations(tmp_path / f"out{n}") for n in (1, 2)]
    assert validated[0] and validated[1] == pytest.approx(validated[0], rel=1e-3)
    if is_adapter:
        said = [json.loads((tmp_path / f"out{n}" / "adapter_config.json").read_text()) for n in (1, 2)]
        assert said[0] == said[1]


def _validations(run):
    """Losses and, of measures, how far off the predictions are."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record.get("rmse", record["loss"]) for record in records if record["event"] == "validation"]
