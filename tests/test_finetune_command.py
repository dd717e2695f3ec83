"""llmctl finetune as a person runs it: every method, resuming, and what the output is good for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from llmctl.errors import UserError  # noqa: E402
from llmctl.finetune import adapter  # noqa: E402
from llmctl.finetune.settings import FinetuneSettings  # noqa: E402
from llmctl.finetune.task import finetuning  # noqa: E402
from llmctl.models.loading import load_model  # noqa: E402
from llmctl.tokenizer import Tokenizer  # noqa: E402

SHORT_SETTINGS = {"seq_len": 64, "batch_size": 2, "precision": "fp32"}
SHORT = ["--steps", "4", "--seq-len", "64", "--batch-size", "2", "--precision", "fp32", "--threads", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small llama over bytes."""
    path = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    tokenizer = Tokenizer.bytes()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def finetune(*words, **how):
    command = [sys.executable, "-m", "llmctl", "finetune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **how)


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


IDS = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora", "adapter", "ia3", "prompt", "prefix"])
def test_each_method_leaves_what_others_load(base, chats, tmp_path, method):
    flags = ["--train-layers", "-1:"] if method == "freeze" else []
    done = finetune(base, chats, "-o", tmp_path / "out", "--method", method, *flags, *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n" and "of the model" in done.stderr
    with torch.no_grad():
        before = load_model(base)(IDS)
        if method in ("full", "freeze"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            ours = load_model(tmp_path / "out")
            assert (ours.layers[0].mixer.q_proj.weight == load_model(base).layers[0].mixer.q_proj.weight).all() == (
                method == "freeze"
            )
        else:
            ours = load_model(base)
            adapter.load(ours, tmp_path / "out")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
            theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out") if method != "adapter" else None
        assert (ours(IDS) - before).abs().max() > 1e-5
        if theirs is not None:
            assert (ours(IDS) - theirs.eval()(IDS).logits[:, -IDS.shape[1] :]).abs().max() < 1e-4
    record = json.loads((tmp_path / "out" / "llmctl.json").read_text())
    assert record["command"] == "finetune" and record["parent_sha256"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_bits(base, chats, tmp_path, method):
    flags = ["--method", method, "--dropout", "0.1", "--save-every", "2", *SHORT, "--steps", "30"]
    if method == "lora":
        flags += ["--neftune", "5", "--keep-best", "--early-stopping", "2", "--validate-every", "3", "--lr", "0.03"]
    assert finetune(base, chats, "-o", tmp_path / "whole", *flags).returncode == 0
    command = [sys.executable, "-m", "llmctl", "finetune", base, chats, "-o", tmp_path / "killed", *flags]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "saved" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    done = finetune("--resume", "-o", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert sha(tmp_path / "killed" / name) == sha(tmp_path / "whole" / name)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "kto"])
def test_preferences_are_learned(base, tmp_path, objective):
    file = tmp_path / "rows.jsonl"
    rows = []
    for i in range(40):
        pair = {"prompt": f"{i} is ", "chosen": "good", "rejected": "bad"}
        if objective == "kto":
            rows += [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True}]
            rows += [{"prompt": pair["prompt"], "completion": pair["rejected"], "label": False}]
        else:
            rows.append(pair)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*SHORT, "--steps", "40", "--batch-size", "8", "--lr", "0.01", "--objective", objective]
    done = finetune(base, file, "-o", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    validations = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in validations if record["event"] == "validation"]
    assert validations[0]["step"] == 0 and validations[-1]["accuracy"] == 1.0
    assert validations[-1]["loss"] < validations[0]["loss"]


def test_gradient_accumulation_changes_nothing(base, chats, tmp_path):
    flags = [*SHORT, "--batch-size", "4", "--lr", "0.01"]
    for name, more in (("whole", []), ("parts", ["--micro-batch-size", "1"])):
        assert finetune(base, chats, "-o", tmp_path / name, *flags, *more).returncode == 0
    models = [load_model(base), load_model(base)]
    for model, name in zip(models, ("whole", "parts")):
        adapter.load(model, tmp_path / name)
    with torch.no_grad():
        assert (models[0](IDS) - models[1](IDS)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "words,code,said",
    [
        (["--targets", "q_prj"], 2, "q_proj"),
        (["--method", "full", "--lora-rank", "4"], 2, "--method lora"),
        (["--method", "freeze"], 2, "--train-layers"),
        (["--objective", "seq2seq"], 1, "seq2seq"),
        (["--lora-rank", "4000"], 1, "at most"),
        (["--ranks", "q_proj"], 2, "q_proj=32"),
    ],
)
def test_bad_calls_get_one_clear_line(base, chats, tmp_path, words, code, said):
    done = finetune(base, chats, "-o", tmp_path / "out", *SHORT, *words)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_its_own_base_and_rows(base, chats, tmp_path):
    """Others are refused, whatever the run still has of the old ones; the same elsewhere are not. An adapter is no base."""
    settings = FinetuneSettings(**SHORT_SETTINGS, save_every=2, keep=3, steps=4)
    out, other_base, other_rows = tmp_path / "out", tmp_path / "base", tmp_path / "rows.jsonl"

    def go(model, rows, **changes):
        with finetuning(dataclasses.replace(settings, **changes), model, [str(rows)], out) as run:
            list(run.run())

    go(base, chats)
    adapter_sha = sha(out / "adapter_model.safetensors")
    shutil.rmtree(out / "trainer" / "step-00000004")
    (out / "llmctl.json").unlink()
    shutil.copytree(base, other_base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data.add_(0.01)
    model.save_pretrained(other_base)
    with pytest.raises(UserError, match="the run began with the weights"):
        go(other_base, chats, resume=True)
    other_rows.write_text(chats.read_text().replace("1 + 1", "1 + 2"))
    with pytest.raises(UserError, match="the run began with"):
        go(base, other_rows, resume=True)
    other_rows.write_text(chats.read_text())
    go(base, other_rows, resume=True)
    assert sha(out / "adapter_model.safetensors") == adapter_sha
    out, from_adapter = tmp_path / "again", out
    with pytest.raises(UserError, match="an adapter of .*no model") as caught:
        go(from_adapter, chats)
    assert "merge-lora" in caught.value.hint


def test_rows_through_a_pipe_are_read_once(base, chats, tmp_path):
    with open(chats) as file:
        done = finetune(base, "-", "-o", tmp_path / "out", *SHORT, stdin=file)
    assert done.returncode == 0, done.stderr
    direct = finetune(base, chats, "-o", tmp_path / "direct", *SHORT)
    assert direct.returncode == 0
    name = "adapter_model.safetensors"
    assert sha(tmp_path / "out" / name) == sha(tmp_path / "direct" / name)
