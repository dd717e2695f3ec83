"""Two gloo processes under torchrun: the losses, the files and the resumed run of one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

SHAPE = ("--params", "60k", "--seq-len", "32", "--batch-size", "4", "--precision", "fp32")
FLAGS = (*SHAPE, "--steps", "12", "--save-every", "4", "--log-every", "1", "--validate-every", "4")
PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, write_tokens, some_texts):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "corpus.arrow", some_texts, held_out=20)


# Muon rounds to bfloat16, which magnifies the last bits of a sum in another order: here it computes in float32.
PROGRAM = """
import sys
import torch
from llmctl.cli import main

torch.Tensor.bfloat16 = lambda tensor: tensor
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


def on_one(program, *arguments):
    return [sys.executable, str(program), "pretrain", *map(str, arguments)]


def on_two(program, *arguments):
    """The command line of two processes; `arguments` as after `llmctl pretrain`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = ["-m", "llmctl"] if program is None else [str(program)]
    return [*torchrun, *command, "pretrain", *map(str, arguments)]


def run_on_two(directory, *arguments, code=0, env=None, program=None):
    result = subprocess.run(
        on_two(program, *arguments), cwd=directory, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert (result.returncode == 0) == (code == 0), result.stderr
    return result


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokens, program):
    """Runs of one process and of two, by optimizer."""
    directory = tmp_path_factory.mktemp("pairs")
    for optimizer in ("adamw", "muon"):
        flags = (tokens, *FLAGS, "--optimizer", optimizer)
        subprocess.run(on_one(program, *flags, "-o", f"{optimizer}1"), cwd=directory, check=True, capture_output=True)
        result = run_on_two(directory, *flags, "--micro-batch-size", 1, "-o", f"{optimizer}2", program=program)
        assert result.stdout == f"{directory / optimizer}2\n"  # only one process speaks
        assert result.stderr.count("step 12/12") == result.stderr.count("finished 12 steps") == 1
    return directory


def losses(output):
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {(record["event"], record["step"]): record["loss"] for record in records}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_have_the_losses_of_one(pairs, optimizer):
    one, two = losses(pairs / f"{optimizer}1"), losses(pairs / f"{optimizer}2")
    assert one.keys() == two.keys() and len(one) == 12 + 3
    assert two == pytest.approx(one, abs=1e-4)
    assert one["train", 12] < one["train", 1] - 1


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_each_goes_on_where_the_other_was_stopped(pairs, program, tmp_path, tokens, optimizer):
    expected = losses(pairs / f"{optimizer}1")
    flags = (tokens, *FLAGS, "--optimizer", optimizer)
    for first, then in ((on_two, on_one), (on_one, on_two)):
        output = tmp_path / f"from-{first.__name__}"
        stop_at_step(4, first(program, *flags, "-o", output))
        assert max(step for _, step in losses(output)) < 12
        subprocess.run(then(program, "--resume", "-o", output), check=True, capture_output=True, timeout=300)
        assert losses(output) == pytest.approx(expected, abs=1e-4)


def stop_at_step(step, line):
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for text in process.stderr:
        if text.startswith(f"step {step}/"):
            process.send_signal(signal.SIGTERM)
            break
    _, rest = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "saved" in rest and rest.count("interrupted") == 1, rest


def test_the_save_of_two_is_safetensors_that_anyone_reads(pairs):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    output = pairs / "adamw2"
    model = AutoModelForCausalLM.from_pretrained(output)
    one = AutoModelForCausalLM.from_pretrained(pairs / "adamw1")
    for mine, theirs in zip(model.parameters(), one.parameters()):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    shards = sorted((output / "trainer" / "step-00000012" / "optimizer-sharded").iterdir())
    assert len(shards) == 2  # each process wrote its own
    for path in output.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".safetensors") or path.name == "lock", path
            assert not path.read_bytes()[:2].startswith(PICKLE_MAGIC), path
    sizes = [sum(f.get_tensor(name).numel() for name in f.keys()) for f in (safe_open(s, "pt") for s in shards)]
    n = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * n <= sum(sizes) <= 2 * n + 1000 and min(sizes) > 0.4 * sum(sizes)


def test_a_resume_opens_no_pickle(pairs, tmp_path):
    """torch.load and pickle.load raise in all processes of a run that goes on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pickle\n"
        "def refuse(*_, **__):\n"
        "    raise RuntimeError('a pickle was opened')\n"
        "pickle.load = refuse\n"
    )  # fmt: skip
    output = pairs / "muon2"
    (output / "llmctl.json").unlink()
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = run_on_two(pairs, "--resume", "-o", output, env={"PYTHONPATH": paths})
    assert "going on from step 12" in result.stderr
    assert (output / "llmctl.json").exists()


def test_a_batch_that_does_not_divide_is_refused_by_one(tokens, tmp_path):
    result = run_on_two(tmp_path, tokens, *SHAPE[:4], "--batch-size", 3, "--steps", 2, "-o", "out", code=2)
    assert result.stderr.count("--batch-size 3 is no multiple of the 2 processes") == 1
    assert not (tmp_path / "out").exists()


def test_what_rank_0_refuses_ends_all(tokens, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    began = time.monotonic()
    result = run_on_two(tmp_path, tokens, *SHAPE, "--steps", 2, "-o", "out", code=2)
    assert result.stderr.count("exists already") == 1 and "rank 1" not in result.stderr
    assert time.monotonic() - began < 60


FAULTY = """
import os, sys
from llmctl.cli import main
from llmctl.train import distributed, loop, state

fault = sys.argv.pop(1)
if fault == "full disk on rank 0":
    def no_room(*_):
        raise OSError(28, "No space left on device")
    state.write_model = no_room
if fault == "full disk on rank 1":
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    original = FileSystemWriter._write_data
    def write_data(self, *arguments):
        if distributed.rank() == 1:
            raise OSError(28, "No space left on device")
        return original(self, *arguments)
    FileSystemWriter._write_data = write_data
if fault == "a defect on rank 1":
    step = loop.Trainer.step
    def stepping(self, *arguments):
        if distributed.rank() == 1 and self.step_number == 2:
            raise ValueError("a defect")
        return step(self, *arguments)
    loop.Trainer.step = stepping
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("full disk on rank 0", "the save of step 4 failed: No space left on device; nothing was saved before"),
        ("full disk on rank 1", "the save of step 4 failed: No space left on device; nothing was saved before"),
        ("a defect on rank 1", "rank 1: error: unexpected ValueError: a defect"),
    ],
)
def test_an_error_on_one_ends_all(tokens, tmp_path, fault, said):
    (tmp_path / "faulty.py").write_text(FAULTY)
    line = on_two(tmp_path / "faulty.py", tokens, *FLAGS, "-o", "out")
    line.insert(line.index("pretrain"), fault)
    began = time.monotonic()
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and time.monotonic() - began < 60
    assert result.stderr.count(said) == 1, result.stderr
    assert not list(tmp_path.glob("out/trainer/.*")) and not list(tmp_path.glob("out/trainer/step-*"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_said_once(tokens, tmp_path):
    flags = ("--lr", "1e38", "--warmup-steps", 0, "--save-every", 1, "--steps", 9, "-o", "out")
    result = run_on_two(tmp_path, tokens, *SHAPE, *flags, code=1)
    assert result.stderr.count("the loss is") == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_piped_stream_is_read_by_one(tokens, tmp_path, pairs):
    with open(tokens, "rb") as stdin:
        line = on_two(None, *FLAGS, "--optimizer", "adamw", "-o", "out")
        subprocess.run(line, cwd=tmp_path, stdin=stdin, check=True, capture_output=True, timeout=300)
    assert losses(tmp_path / "out") == pytest.approx(losses(pairs / "adamw1"), abs=1e-4)
