"""`--log`: the numbers of a run reach TensorBoard and Weights & Biases, and a run that goes on stays one run there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# What llmctl calls of the package, noted as JSON lines in the file that WANDB_CALLS names.
FAKE_WANDB = """
import json, os, sys

class errors:
    class Error(Exception):
        pass

class Settings(dict):
    pass

def note(call, /, **values):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps([call, values]) + "\\n")

class Run:
    def define_metric(self, name, step_metric): note("define_metric", name=name, step_metric=step_metric)
    def log(self, numbers): note("log", **numbers)
    def finish(self, exit_code): note("finish", exit_code=exit_code)

def init(**arguments):
    if "WANDB_FAILS" in os.environ:
        raise errors.Error("No API key configured.")
    note("init", **arguments)
    print("wandb: hello", file=sys.stderr)
    return Run()
"""
FLAGS = ("--params", "60k", "--seq-len", "32", "--batch-size", "4", "--steps", "4", "--log-every", "2")


@pytest.fixture
def tokens(tmp_path, write_tokens, some_texts):
    return write_tokens(tmp_path / "corpus.arrow", some_texts, held_out=20)


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """The calls so far, as (name, arguments)."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB)
    paths = [str(tmp_path / "fake"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("WANDB_CALLS", str(tmp_path / "calls.jsonl"))
    return lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


def go_on(llmctl, output: Path):
    """Resume a run as if it had been killed after its last save."""
    (output / "llmctl.json").unlink()
    return llmctl("pretrain", "--resume", "-o", output)


def test_wandb_sees_one_run_per_run(llmctl, tmp_path, tokens, fake_wandb):
    for folder in ("a", "b"):
        result = llmctl("pretrain", tokens, *FLAGS, "--log", "wandb", "-o", f"{folder}/run")
        assert result.stdout == f"{tmp_path / folder / 'run'}\n"
    go_on(llmctl, tmp_path / "a" / "run")
    calls = fake_wandb()
    first, second, resumed = (arguments for name, arguments in calls if name == "init")
    assert first["name"] == second["name"] == "run" and first["id"] != second["id"]
    assert (first["resume"], resumed["resume"], resumed["id"]) == (None, "allow", first["id"])
    assert first["config"]["settings"]["steps"] == 4 and first["dir"] == str(tmp_path / "a" / "run")
    logged = [arguments for name, arguments in calls[: calls.index(["finish", {"exit_code": 0}])] if name == "log"]
    records = [json.loads(line) for line in (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in logged] == [record["step"] for record in records]
    assert [each.get("train/loss") for each in logged[:2]] == [record["loss"] for record in records[:2]]
    assert logged[-1]["validation/bits_per_byte"] == records[-1]["bits_per_byte"]
    assert ["define_metric", {"name": "*", "step_metric": "step"}] in calls


def test_wandb_is_told_of_a_failure_and_its_own_is_one_line(llmctl, tmp_path, tokens, fake_wandb):
    flags = ("--log", "wandb", "--lr", "1e38", "--warmup-steps", "0")
    llmctl("pretrain", tokens, *FLAGS, *flags, "-o", "run", code=1)
    assert fake_wandb()[-1] == ["finish", {"exit_code": 1}]
    result = llmctl("pretrain", tokens, *FLAGS, "--log", "wandb", "-o", "other", env={"WANDB_FAILS": "1"}, code=1)
    assert "error: --log wandb: No API key configured." in result.stderr and "defect" not in result.stderr


def test_a_logger_that_is_not_installed_is_named(llmctl, tmp_path, tokens):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = llmctl("pretrain", tokens, *FLAGS, "--log", "wandb", "-o", "run", code=2, env={"PYTHONPATH": paths})
    assert "--log wandb needs the package wandb" in result.stderr and "pip install wandb" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_real_wandb_takes_it(llmctl, tmp_path, tokens):
    pytest.importorskip("wandb")
    offline = {"WANDB_MODE": "offline"}
    result = llmctl("pretrain", tokens, *FLAGS, "--log", "wandb", "-o", "run", env=offline)
    assert result.stdout == f"{tmp_path / 'run'}\n"
    (tmp_path / "run" / "llmctl.json").unlink()
    llmctl("pretrain", "--resume", "-o", "run", env=offline)
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and runs[0].name == runs[1].name
    assert b"train/loss" in runs[0].read_bytes()


def test_tensorboard_gets_the_numbers_once(llmctl, tmp_path, tokens):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    llmctl("pretrain", tokens, *FLAGS, "--log", "tensorboard", "-o", "run")
    go_on(llmctl, tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
