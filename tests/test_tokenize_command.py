"""`llmctl tokenize` as a person runs it."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llmctl.data.corpus import Corpus
from llmctl.tokenizer import Tokenizer

LLMCTL = [sys.executable, "-m", "llmctl"]
BYTES = ("--tokenizer", "bytes")


def text_of(corpus, split="train"):
    view = corpus.split(split)
    return corpus.tokenizer.decode(view.read(0, view.n_tokens).tolist())


def stream_file(folder, data):
    path = folder / "stdout.arrow"
    path.write_bytes(data)
    return path


def test_text_through_a_pipe(llmctl, tmp_path):
    content = "Once upon a time\nthere was naïve 🦊\n"
    result = llmctl("tokenize", *BYTES, input=content.encode())
    corpus = Corpus.open([stream_file(tmp_path, result.stdout)])
    assert text_of(corpus) == content
    view = corpus.split("train")
    assert (view.n_documents, view.n_bytes) == (1, len(content.encode()))
    summary = result.stderr.decode().splitlines()[-1].split()
    assert summary == ["train", "1", str(view.n_tokens), "39", "B", "0.975"]


def test_a_corpus_without_a_tokenizer_trains_one(llmctl, tmp_path, data):
    source = data / "text" / "tinyshakespeare.txt"
    arguments = ("--vocab-size", "500", "--val-fraction", "0.1", "--save-tokenizer", "saved")
    result = llmctl("tokenize", *arguments, input=source.read_bytes())
    assert b"note: no --tokenizer: training a byte-level BPE of 500 tokens on the training part" in result.stderr
    corpus = Corpus.open([stream_file(tmp_path, result.stdout)])
    content = source.read_bytes()
    n_val = round(len(content) * 0.1)
    assert text_of(corpus) == content[:-n_val].decode()
    assert text_of(corpus, "val") == content[-n_val:].decode()
    assert (corpus.split("train").n_documents, corpus.split("val").n_documents) == (1, 1)
    assert corpus.split("val").n_bytes == n_val
    assert Tokenizer.load(tmp_path / "saved").sha256 == corpus.tokenizer.sha256
    # The held-out text must not shape the tokenizer.
    (tmp_path / "train.txt").write_bytes(content[:-n_val])
    llmctl("tokenize", "train.txt", "--vocab-size", "500", "-o", "train.arrow")
    assert Corpus.open([tmp_path / "train.arrow"]).tokenizer.sha256 == corpus.tokenizer.sha256


def test_the_sample_bounds_what_the_tokenizer_sees(llmctl, tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 500 + "xyz" * 500)
    llmctl("tokenize", "a.txt", "--train-sample", "1kB", "-o", "a.arrow")
    tokens = {Corpus.open([tmp_path / "a.arrow"]).tokenizer.token_bytes(i) for i in range(270)}
    assert b"abab" in tokens
    assert not any(b"xy" in token for token in tokens)


def test_a_file_is_named_on_stdout_when_it_is_complete(llmctl, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    result = llmctl("tokenize", "a.txt", *BYTES, "-o", "out/a.arrow")
    assert result.stdout == f"{tmp_path / 'out' / 'a.arrow'}\n"
    assert text_of(Corpus.open([tmp_path / "out" / "a.arrow"])) == "some text"
    assert os.listdir(tmp_path / "out") == ["a.arrow"]


def test_a_directory_gets_shards(llmctl, tmp_path):
    texts = [f"document {i} " * (1 + i % 7) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    llmctl("tokenize", "a.jsonl", *BYTES, "-o", "shards", "--shard-tokens", "2k")
    llmctl("tokenize", "a.jsonl", *BYTES, "-o", "whole.arrow")
    names = sorted(os.listdir(tmp_path / "shards"))
    assert len(names) > 3 and names[0] == "shard-00000.arrow"
    shards, whole = (Corpus.open([tmp_path / name]).split("train") for name in ("shards", "whole.arrow"))
    assert shards.read(0, shards.n_tokens).tolist() == whole.read(0, whole.n_tokens).tolist()
    assert (shards.n_documents, shards.n_bytes) == (200, whole.n_bytes)
    assert shards.starts.tolist() == whole.starts.tolist()
    sizes = [Corpus.open([tmp_path / "shards" / name]).split("train").n_tokens for name in names]
    longest = max(len(text) for text in texts) + 1
    assert all(2000 <= size < 2000 + longest for size in sizes[:-1])


def test_the_tail_is_held_out_across_documents(llmctl, tmp_path):
    texts = ["aaaa", "bb字b", "cccc"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    llmctl("tokenize", "a.jsonl", *BYTES, "-o", "a.arrow", "--val-fraction", "0.55")
    corpus = Corpus.open([tmp_path / "a.arrow"])
    train, val = corpus.split("train"), corpus.split("val")
    decode = corpus.tokenizer.decode
    # 14 bytes, 8 of them held out: byte 6 begins 字.
    assert [decode(train.document(i).tolist()) for i in range(train.n_documents)] == ["aaaa", "bb"]
    assert [decode(val.document(i).tolist()) for i in range(val.n_documents)] == ["字b", "cccc"]
    assert (train.n_bytes, val.n_bytes) == (6, 8)


def test_every_file_is_a_document(llmctl, tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / "empty.txt").write_text("")
    llmctl("tokenize", "a.txt", "b.txt.gz", "empty.txt", "-", *BYTES, "-o", "out.arrow", input="third")
    view = Corpus.open([tmp_path / "out.arrow"]).split("train")
    assert [bytes(view.document(i)[:-1].tolist()) for i in range(3)] == [b"first", b"second", b"third"]


def test_workers_change_nothing(llmctl, tmp_path, data):
    source = data / "text" / "alice29.txt"
    one, two = (llmctl("tokenize", source, *BYTES, "--workers", n, "-o", f"{n}.arrow").stdout.strip() for n in (1, 2))
    assert Corpus.open([one]).sha256 == Corpus.open([two]).sha256


def test_a_file_on_standard_input_is_not_spooled(llmctl, tmp_path):
    (tmp_path / "a.txt").write_text("skipped\nsome text")
    with open(tmp_path / "a.txt", "rb", buffering=0) as file:
        file.seek(8)
        arguments = ("--vocab-size", "260", "--val-fraction", "0.5", "-o", "out.arrow")
        llmctl("tokenize", *arguments, stdin=file, env={"TMPDIR": "/nowhere"})
    corpus = Corpus.open([tmp_path / "out.arrow"])
    assert text_of(corpus) + text_of(corpus, "val") == "some text"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere.txt",), 1, "nowhere.txt: no such file"),
        ((".",), 1, ".: is a directory"),
        (("empty.txt",), 1, "empty.txt: no text in it, the input is empty"),
        (("empty.txt", *BYTES), 1, "the input is empty"),
        (("empty.txt", *BYTES, "--val-fraction", "0.1"), 1, "the input is empty"),
        (("a.txt", *BYTES, "--val-fraction", "0.01"), 1, "9 bytes of text are too few"),
        (("latin1.txt", *BYTES), 1, "latin1.txt: the byte 0xe9 at offset 3 is not UTF-8"),
        (("broken.jsonl", *BYTES), 1, "broken.jsonl:2: no field 'text'; the keys are 'body'"),
        (("a.txt", "--tokenizer", "nowhere"), 1, "nowhere"),
        (("a.txt", "--vocab-size", "7"), 1, "a vocabulary of 7 is too small"),
        (("a.txt", *BYTES, "-o", "a.txt"), 2, "a.txt: exists already"),
        (("a.txt", *BYTES, "-o", "a.txt", "--overwrite"), 2, "a.txt: would replace a.txt, which is read"),
        (("a.txt", *BYTES, "-o", "b.arrow", "--save-tokenizer", "full"), 2, "full: exists already"),
        (("a.txt", *BYTES, "-o", "full", "--overwrite"), 2, "full: holds file too, which --overwrite would delete"),
        (("a.txt", "-o", "b.arrow", "--save-tokenizer", "full", "--overwrite"), 2, "full: holds file too"),
        (("a.txt", *BYTES, "-o", "a.txt/b.arrow"), 2, "a.txt: is a file, so nothing can be written into it"),
        (("a.txt", *BYTES, "--shard-tokens", "5"), 2, "--shard-tokens needs a directory"),
        (("a.txt", *BYTES, "--shard-tokens", "5", "-o", "b.arrow"), 2, "--shard-tokens needs a directory"),
        (("a.txt", *BYTES, "--vocab-size", "300"), 2, "--vocab-size is for training a tokenizer"),
        (("-", "-"), 2, "standard input (-) can be read once only"),
        (("a.txt", *BYTES, "--val-fraction", "1.5"), 2, "--val-fraction"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(llmctl, tmp_path, arguments, code, message):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    before = sorted(os.listdir(tmp_path))
    result = llmctl("tokenize", *arguments, code=code)
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_bytes_that_are_not_utf8_are_replaced_where_asked(llmctl, tmp_path):
    result = llmctl("tokenize", *BYTES, "--errors", "replace", input=b"caf\xe9!")
    assert text_of(Corpus.open([stream_file(tmp_path, result.stdout)])) == "caf\ufffd!"


def test_overwrite_replaces_a_directory_of_shards(llmctl, tmp_path):
    (tmp_path / "a.txt").write_text("old")
    llmctl("tokenize", "a.txt", *BYTES, "-o", "out")
    (tmp_path / "a.txt").write_text("new")
    llmctl("tokenize", "a.txt", *BYTES, "-o", "out", code=2)
    llmctl("tokenize", "a.txt", *BYTES, "-o", "out", "--overwrite")
    assert text_of(Corpus.open([tmp_path / "out"])) == "new"


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ("terminal", "no text: standard input is a terminal"),
        ("file", "a token stream is nothing for a terminal"),
    ],
)
def test_a_terminal_is_neither_corpus_nor_output(stdin, message):
    ours, theirs = os.openpty()
    try:
        result = subprocess.run(
            [*LLMCTL, "tokenize", *BYTES],
            stdin=theirs if stdin == "terminal" else subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == 2
    assert message in result.stderr.decode()


def test_a_token_stream_is_not_tokenized_again(llmctl, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    llmctl("tokenize", "a.txt", *BYTES, "-o", "a.arrow")
    result = llmctl("tokenize", "a.arrow", *BYTES, code=1)
    assert "it looks like a token stream" in result.stderr


def test_a_reader_that_goes_away_is_no_error(data, tmp_path):
    (tmp_path / "big.txt").write_bytes((data / "text" / "tinyshakespeare.txt").read_bytes() * 5)
    command = [*LLMCTL, "tokenize", "big.txt", *BYTES]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert len(process.stdout.read(100)) == 100
        process.stdout.close()
        messages = process.stderr.read().decode()
    assert process.returncode == 0
    assert "error" not in messages and "Traceback" not in messages


def test_a_full_disk_is_reported(llmctl, tmp_path):
    with open("/dev/full", "wb") as full:
        command = [*LLMCTL, "tokenize", *BYTES]
        result = subprocess.run(command, input=b"text", stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.decode().splitlines()[-1] == "error: disk full while writing the output"


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted, which needs root")
@pytest.mark.parametrize("output", ["out.arrow", "out"])
def test_a_disk_that_fills_up_leaves_nothing(llmctl, tmp_path, output):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "a.txt").write_text("some text\n" * 50_000)
        result = llmctl("tokenize", "a.txt", *BYTES, "-o", small / output, code=1)
        assert "error: disk full" in result.stderr
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


READ_STREAM = """
from llmctl.errors import UserError
from llmctl.data.corpus import Corpus
import sys
try:
    Corpus.open(["-"], spool_to=sys.argv[1])
except UserError as error:
    sys.exit(error.message)
"""


def test_a_killed_tokenize_is_a_truncated_stream_to_its_reader(tmp_path):
    """`… | llmctl tokenize | reader`, with the middle one killed while it waits for more text."""
    reader = [sys.executable, "-c", READ_STREAM, "spool.arrow"]
    with subprocess.Popen(
        [*LLMCTL, "tokenize", *BYTES, "--split", "line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as tokenize:
        with subprocess.Popen(reader, stdin=tokenize.stdout, stderr=subprocess.PIPE, cwd=tmp_path) as read:
            tokenize.stdin.write(b"a line of text\n" * 2_000_000)
            tokenize.stdin.flush()
            while not any(path.stat().st_size > 1_000_000 for path in tmp_path.glob(".spool.arrow*")):
                assert read.poll() is None
                time.sleep(0.05)
            tokenize.send_signal(signal.SIGKILL)
            tokenize.stdout.close()
            message = read.stderr.read().decode()
    assert read.returncode == 1
    assert message.startswith("standard input: truncated stream")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_ends_a_tokenize_that_waits_for_text(tmp_path):
    command = [*LLMCTL, "tokenize", *BYTES, "-o", "out.arrow"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdin.write(b"a line of text\n" * 2_000_000)
        process.stdin.flush()
        while not list(tmp_path.glob(".out.arrow*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        messages = process.stderr.read().decode()
    assert process.returncode == 130
    assert "Traceback" not in messages and "Fatal" not in messages
    assert os.listdir(tmp_path) == []


def peak_memory(command, cwd):
    """Megabytes of the largest process among those run by a fresh parent."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return int(result.stdout) / (1e6 if sys.platform == "darwin" else 1e3)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, form):
    lines = [f"{' '.join(map(str, row))}\n" for row in np.random.default_rng(0).integers(0, 9999, (20_000, 12))]
    unit = "".join(lines)
    if form == "jsonl":
        unit = "".join(json.dumps({"text": "".join(lines[i : i + 50])}) + "\n" for i in range(0, len(lines), 50))
    peaks = []
    for megabytes in (100, 400):
        with open(tmp_path / f"corpus.{form}", "w") as file:
            while file.tell() < megabytes * 1e6:
                file.write(unit)
        command = [*LLMCTL, "tokenize", f"corpus.{form}", *BYTES, "--val-fraction", "0.1", "-o", "out", "--overwrite"]
        peaks.append(peak_memory(command, tmp_path))
    assert peaks[1] < peaks[0] + 60
