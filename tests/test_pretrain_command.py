"""`llmctl pretrain` as a person uses it: processes, pipes, signals, a full disk, a closed standard error."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SHAPE = ("--params", "60k", "--seq-len", "32", "--batch-size", "4", "--precision", "fp32", "--dropout", "0.1")
COMMAND = [sys.executable, "-m", "llmctl", "pretrain"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, write_tokens, some_texts):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "corpus.arrow", some_texts, held_out=20)


def sha256(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def start(cwd, *flags, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE):
    return subprocess.Popen([*COMMAND, *map(str, flags)], cwd=cwd, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr)


def wait_for_line(process, word):
    for line in process.stderr:
        if word in line.decode():
            return
    pytest.fail(f"the run ended without saying {word!r}")


def metrics(output):
    times = ("tokens_per_second", "mfu", "seconds", "memory_bytes")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in times} for record in records]


# --- streams ---


def test_a_pipe_in_a_path_out_and_the_whole_default_output(llmctl, tokens, tmp_path):
    piped = llmctl("pretrain", *SHAPE, "--steps", 20, "--log-every", 5, input=tokens.read_bytes())
    output = tmp_path / "runs" / "pretrain"
    assert piped.stdout == f"{output}\n".encode()
    lines = piped.stderr.decode().splitlines()
    assert b"\r" not in piped.stderr and b"\x1b" not in piped.stderr
    assert [line.split()[1] for line in lines if " loss " in line] == ["5/20", "10/20", "15/20", "20/20"]
    assert "parameters" in lines[0] and lines[1].startswith("20 steps") and lines[-1].startswith("finished 20 steps")
    refused = llmctl("pretrain", *SHAPE, "--steps", 20, input=tokens.read_bytes(), code=2)
    assert b"exists already" in refused.stderr and b"--resume" in refused.stderr
    assert "Traceback" not in refused.stderr.decode()
    again = llmctl("pretrain", "--resume")  # the default output, without standard input
    assert again.stdout == f"{output}\n"
    quiet = llmctl("pretrain", "--resume", "--quiet")
    assert quiet.stderr == "" and quiet.stdout == f"{output}\n"


def test_resume_needs_standard_input_no_more(llmctl, tokens, tmp_path):
    llmctl("pretrain", tokens, *SHAPE, "--steps", 40, "-o", "whole")
    with open(tokens, "rb") as stdin:
        process = start(tmp_path, *SHAPE, "--steps", 40, "-o", "parts", "--log-every", 1, stdin=stdin)
        wait_for_line(process, "step 3/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    resumed = llmctl("pretrain", "--resume", "-o", "parts")
    assert resumed.stdout == f"{tmp_path / 'parts'}\n" and "going on from step" in resumed.stderr
    assert sha256(tmp_path / "parts") == sha256(tmp_path / "whole")


@pytest.mark.parametrize("content", ["nothing", "cut", "text"])
def test_a_broken_pipe_upstream_leaves_no_output(llmctl, tokens, tmp_path, content):
    whole = tokens.read_bytes()
    data, said = {
        "nothing": (b"", "truncated stream: it is empty"),
        "cut": (whole[: len(whole) // 2], "truncated stream"),
        "text": (b"To be, or not to be", "not a llmctl token stream"),
    }[content]
    failed = llmctl("pretrain", *SHAPE, "--steps", 5, "-o", "out", input=data, code=1)
    lines = failed.stderr.decode().splitlines()
    assert said in lines[0] and lines[0].startswith("error: standard input: ") and len(lines) <= 2
    assert failed.stdout == b"" and not (tmp_path / "out").exists()
    if content == "cut":
        llmctl("pretrain", tokens, *SHAPE, "--steps", 5, "-o", "out")


def test_killed_while_it_still_reads_its_input(llmctl, tokens, tmp_path):
    data = tokens.read_bytes()
    for flags in ((), ("--resume",)):
        process = start(tmp_path, *SHAPE, "--steps", 5, "-o", "out", stdin=subprocess.PIPE)
        process.stdin.write(data[: len(data) // 2])
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/trainer/.incoming*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.stdin.close()
        process.wait()
        assert list(tmp_path.glob("out/trainer/.incoming*")) != []
        done = llmctl("pretrain", *SHAPE, "--steps", 5, "-o", "out", *flags, input=data)
        assert done.stdout == f"{tmp_path / 'out'}\n".encode()
        assert not list(tmp_path.glob("out/trainer/.*"))
        (tmp_path / "out").rename(tmp_path / f"done{len(flags)}")


def test_a_closed_standard_error_does_not_end_the_run(tokens, tmp_path):
    for number, stderr in enumerate(("2>&-", "2>&1 >path | head -c 1")):
        flags = " ".join([*SHAPE, "--steps", "30", "--log-every", "1", "-o", f"out{number}"])
        line = f"{sys.executable} -m llmctl pretrain {tokens} {flags} {stderr}"
        subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, capture_output=True, timeout=120)
        deadline = time.monotonic() + 60
        while not (tmp_path / f"out{number}" / "llmctl.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (tmp_path / f"out{number}" / "llmctl.json").exists()


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_the_second_ends_at_once(llmctl, tokens, tmp_path, number):
    process = start(tmp_path, tokens, *SHAPE, "--steps", 100_000, "-o", "out", "--log-every", 1)
    wait_for_line(process, "step 3/")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and stdout == b""
    assert stderr.decode().splitlines()[-2:] == [stderr.decode().splitlines()[-2], "interrupted"]
    assert "saved" in stderr.decode().splitlines()[-2]
    (save,) = (tmp_path / "out" / "trainer").glob("step-*")
    assert json.loads((save / "state.json").read_text())["step"] >= 3

    # a step that takes minutes: only the second signal ends it
    long = (tokens, *SHAPE[:2], "--seq-len", 32, "--batch-size", 8, "--steps", 9, "-o", "long", "--log-every", 1)
    process = start(tmp_path, *long[:-4], "--batch-size", 30_000, *long[-4:])
    wait_for_line(process, "9 steps")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    process.send_signal(number)
    assert process.wait(5) == -number


def kill_and_resume(tokens, tmp_path, name, n_kills, seed):
    """Start a run again and again, each time killed at a random moment; the last one may come to its end."""
    choose = random.Random(seed)
    output = tmp_path / name
    for _ in range(n_kills):
        started = (output / "trainer" / "plan.json").exists()
        arguments = ["--resume"] if started else [tokens, *KILLED, "--resume"]
        process = start(tmp_path, *arguments, "-o", name)
        wait_for_line(process, choose.choice([" parameters ", " loss ", " saved "]))
        time.sleep(choose.uniform(0, 0.4))
        process.kill()
        process.communicate()
        if (output / "model.safetensors").exists():
            read_checkpoint(output)
    subprocess.run([*COMMAND, "--resume", "-o", name], cwd=tmp_path, check=True, capture_output=True)


def read_checkpoint(output):
    from llmctl.models.loading import load_model

    load_model(output)


@pytest.fixture(scope="module")
def never_killed(tokens, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, tokens, *KILLED, "-o", "whole"], cwd=directory, check=True, capture_output=True)
    return directory / "whole"


KILLED = (*SHAPE, "--steps", "150", "--save-every", "3", "--log-every", "7", "--validate-every", "30")


def test_killed_at_random_moments_it_ends_in_the_same_bits(tokens, tmp_path, never_killed):
    kill_and_resume(tokens, tmp_path, "out", n_kills=3, seed=0)
    assert sha256(tmp_path / "out") == sha256(never_killed)
    assert metrics(tmp_path / "out") == metrics(never_killed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_killed_at_twenty_random_moments_it_ends_in_the_same_bits(tokens, tmp_path, never_killed, seed):
    kill_and_resume(tokens, tmp_path, "out", n_kills=5, seed=seed)
    assert sha256(tmp_path / "out") == sha256(never_killed)
    assert metrics(tmp_path / "out") == metrics(never_killed)


# --- failures ---


def failure(result, code):
    assert result.returncode == code and result.stdout == ""
    lines = result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1 and len(lines) - errors[0] <= 2, result.stderr
    return " ".join(lines[errors[0] :])


def test_refusals_are_one_line_and_leave_nothing(llmctl, tokens, tmp_path):
    for flags, code, said in (
        (("--steps", 5, "--tokens", 1000), 2, "--steps and --tokens"),
        (("--optimizer", "muno"), 2, "muno"),
        (("--init-from", "nowhere"), 1, "nowhere"),
        (("--init-from", "out/a", "--overwrite"), 2, "out: would replace out/a, which is read"),
    ):
        text = failure(llmctl("pretrain", tokens, *flags, "-o", "out", code=code), code)
        assert said in text
        assert not (tmp_path / "out").exists()
    llmctl("pretrain", tokens, *SHAPE, "--steps", 3, "-o", "out")
    text = failure(llmctl("pretrain", "--resume", "--lr", 0.5, "-o", "out", code=2), 2)
    assert "--learning-rate 0.5: the run to resume was started without it" in text


def test_a_loss_that_is_not_finite_is_one_line(llmctl, tokens, tmp_path):
    flags = ("--lr", "1e38", "--warmup-steps", 0, "--save-every", 1, "--steps", 9, "-o", "out")
    text = failure(llmctl("pretrain", tokens, *SHAPE, *flags, code=1), 1)
    assert "the loss is" in text and "--learning-rate" in text
    read_checkpoint(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="a small disk is mounted, which takes root")
def test_a_full_disk_keeps_the_last_save(llmctl, tokens, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        shape = ("--params", "250k", "--seq-len", 32, "--batch-size", 4, "--precision", "fp32", "--optimizer", "adamw")
        flags = ("--steps", 6, "--save-every", 2, "--keep", 3, "-o", disk / "out")
        text = failure(llmctl("pretrain", tokens, *shape, *flags, code=1), 1)
        assert "save of step" in text and "free" in text and "is intact" in text and "--resume" in text
        read_checkpoint(disk / "out")
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
        llmctl("pretrain", "--resume", "-o", disk / "out")
        llmctl("pretrain", tokens, *shape, *flags[:-1], tmp_path / "whole")
        assert sha256(disk / "out") == sha256(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited as Linux does it")
def test_out_of_memory_says_which_flag_helps(tokens, tmp_path):
    flags = ["--params", "60k", "--seq-len", "2048", "--batch-size", "256", "--steps", "2", "-o", "out"]
    line = ["bash", "-c", 'ulimit -v 3500000; exec "$@"', "bash", *COMMAND, str(tokens), *flags]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    text = failure(result, 1)
    assert "out of memory" in text and "--micro-batch-size" in text


# --- reports ---


def test_a_dry_run_is_a_table_and_no_file(llmctl, tokens, tmp_path):
    for keywords in ({}, {"input": tokens.read_bytes()}):
        files = [] if keywords else [tokens]
        result = llmctl("pretrain", *files, *SHAPE, "--steps", 50, "--dry-run", "-o", "out", **keywords)
        text = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
        assert not result.stdout and list(tmp_path.iterdir()) == []
        for row in ("parameters", "compute", "peak memory", "disk", "speed", "time", "50 of 128 tokens"):
            assert row in text
