"""Checkpoints on disk: nothing half written, nothing lost, and every broken file named."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import weakref

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl import files, lineage
from llmctl.checkpoint import (
    LazyTensor,
    check_free_space,
    open_tensors,
    resolve_model,
    save_tensors,
    staged_directory,
    write_atomic,
)
from llmctl.errors import CalledWrongly, UserError
from llmctl.tensor_file import TORCH_NAMES


def some_tensors():
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 5),
        "half": torch.randn(3, dtype=torch.float32).to(torch.bfloat16),
        "transposed": torch.randn(4, 6).T,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def leftovers(directory):
    return sorted(path.name for path in directory.iterdir() if "partial" in path.name)


def test_round_trip_agrees_with_the_reference_reader(tmp_path):
    tensors = some_tensors()
    save_tensors(tmp_path, tensors)
    reference = safetensors.torch.load_file(tmp_path / "model.safetensors")
    mapped = open_tensors(tmp_path)
    assert set(mapped.keys()) == set(reference) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(mapped.get(name), tensor) and mapped.dtype(name) == tensor.dtype
        assert mapped.shape(name) == tuple(tensor.shape)
        assert torch.equal(reference[name], tensor) and reference[name].dtype == tensor.dtype


def test_reads_what_the_reference_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    mapped = open_tensors(tmp_path / "model.safetensors")
    assert all(torch.equal(mapped.get(name), tensor) for name, tensor in tensors.items())


@settings(max_examples=40, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(sorted(set(TORCH_NAMES.values()))), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    shard_bytes=st.integers(1, 400),
)
def test_any_dtypes_shapes_and_shards_survive(tmp_path_factory, specs, shard_bytes):
    directory = tmp_path_factory.mktemp("any")
    tensors = {}
    for i, (dtype, shape) in enumerate(specs):
        kind = getattr(torch, dtype)
        count = torch.Size(shape).numel() * kind.itemsize
        raw = torch.randint(0, 2, (count,), dtype=torch.uint8)
        tensors[f"t.{i}"] = raw.view(kind).view(shape)
    save_tensors(directory, tensors, shard_bytes=shard_bytes)
    mapped = open_tensors(directory)
    for name, tensor in tensors.items():
        found = mapped.get(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert bytes(found.reshape(-1).view(torch.uint8).numpy()) == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_shards_and_index_load_in_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.config.save_pretrained(tmp_path)
    save_tensors(tmp_path, model.state_dict(), shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_lazy_tensors_are_made_one_at_a_time(tmp_path):
    alive = []

    def make(i):
        assert all(reference() is None for reference in alive)
        tensor = torch.full((1000,), float(i))
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = {f"t{i}": LazyTensor((1000,), torch.float32, lambda i=i: make(i)) for i in range(5)}
    save_tensors(tmp_path, lazy)
    copy = open_tensors(tmp_path)
    (tmp_path / "copy").mkdir()
    save_tensors(tmp_path / "copy", {name: copy.lazy(name) for name in copy})
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    save_tensors(tmp_path, {"a": torch.zeros(8)})
    open_tensors(tmp_path).get("a").add_(1)
    assert torch.equal(open_tensors(tmp_path).get("a"), torch.zeros(8))


def test_a_tensor_that_starts_off_its_alignment_is_read(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    text = json.dumps(header).encode()
    values = torch.tensor([1.5, -2.0])
    body = b"\x07" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert torch.equal(open_tensors(tmp_path).get("b"), values)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, 300, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_tensors(tmp_path, some_tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or corrupt"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    ],
)
def test_a_corrupt_header_is_named(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="truncated or corrupt"):
        open_tensors(tmp_path).get("a")


def test_shards_that_are_missing_or_lack_a_tensor_are_named(tmp_path):
    save_tensors(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)}, shard_bytes=16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["b"]
    index["weight_map"]["c"] = shard.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{shard.name}.*places c there"):
        open_tensors(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: this shard is missing"):
        open_tensors(tmp_path)
    index["weight_map"]["c"] = "../other.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside"):
        open_tensors(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UserError, match="a pickle") as caught:
            open_tensors(path)
        assert "save_pretrained" in caught.value.hint


def test_a_directory_without_tensors_says_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        open_tensors(tmp_path)
    with pytest.raises(UserError, match="has no tensor named x"):
        save_tensors(tmp_path, {"a": torch.zeros(1)})
        open_tensors(tmp_path).get("x")


def test_staged_directory_appears_whole(tmp_path):
    with staged_directory(tmp_path / "deep/out") as stage:
        (stage / "a").write_text("1")
        assert not (tmp_path / "deep/out").exists()
    assert (tmp_path / "deep/out/a").read_text() == "1"
    assert leftovers(tmp_path / "deep") == []


def test_staged_directory_refuses_or_replaces(tmp_path):
    out = tmp_path / "out"
    for attempt in ("first", "second"):
        with staged_directory(out, overwrite=attempt == "second") as stage:
            (stage / attempt).write_text(attempt)
    assert [path.name for path in out.iterdir()] == ["second"]
    with pytest.raises(CalledWrongly, match="exists already") as caught, staged_directory(out):
        raise AssertionError("the block must not run")
    assert "--overwrite" in caught.value.hint
    assert leftovers(tmp_path) == []


def test_an_empty_directory_is_taken_and_a_file_is_not(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as stage:
        (stage / "a").touch()
    assert (tmp_path / "out/a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CalledWrongly), staged_directory(tmp_path / "file"):
        pass


@pytest.mark.parametrize("has_exchange", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_output(tmp_path, monkeypatch, error, has_exchange):
    if not has_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    with staged_directory(out) as stage:
        (stage / "old").touch()
    with pytest.raises(error), staged_directory(out, overwrite=True) as stage:
        (stage / "new").touch()
        raise error
    assert [path.name for path in out.iterdir()] == ["old"] and leftovers(tmp_path) == []
    with staged_directory(out, overwrite=True) as stage:
        (stage / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"] and leftovers(tmp_path) == []


KILLED_WRITER = """
import sys, time
from llmctl.checkpoint import staged_directory
with staged_directory(sys.argv[1], overwrite=True) as stage:
    (stage / "new").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_loses_nothing_and_its_stage_is_swept(tmp_path):
    out = tmp_path / "out"
    with staged_directory(out) as stage:
        (stage / "old").touch()
    writer = subprocess.Popen([sys.executable, "-c", KILLED_WRITER, out], stdout=subprocess.PIPE)
    writer.stdout.readline()
    with staged_directory(out, overwrite=True) as stage:
        assert len(leftovers(tmp_path)) == 2  # the live writer's stage is left alone
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(leftovers(tmp_path)) == 1
    with staged_directory(out, overwrite=True) as stage:
        (stage / "last").touch()
    assert [path.name for path in out.iterdir()] == ["last"] and leftovers(tmp_path) == []


@contextlib.contextmanager
def small_disk(directory):
    """A filesystem of 1 MB; needs the right to mount."""
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small filesystem needs root: " + mounted.stderr.decode().strip())
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def test_a_full_disk_is_refused_before_the_save(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(UserError, match="are needed on disk"), staged_directory(disk / "out") as stage:
            save_tensors(stage, {"a": torch.zeros(1_000_000)})
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_during_the_save_keeps_the_old_checkpoint(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        with staged_directory(disk / "out") as stage:
            save_tensors(stage, {"a": torch.ones(50_000)})

        def fill_then_make():
            (disk / "other").write_bytes(bytes(500_000))
            return torch.zeros(150_000)

        lazy = {"a": LazyTensor((150_000,), torch.float32, fill_then_make)}
        with pytest.raises(OSError) as caught, staged_directory(disk / "out", overwrite=True) as stage:
            save_tensors(stage, lazy)
        assert caught.value.errno == errno.ENOSPC
        assert leftovers(disk) == []
        assert torch.equal(open_tensors(disk / "out").get("a"), torch.ones(50_000))


def test_free_space_is_compared_with_the_need(tmp_path, monkeypatch):
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    check_free_space(tmp_path / "not/yet/there", 0)
    with pytest.raises(UserError, match="MB are free"):
        check_free_space(tmp_path / "not/yet/there", free * 2 + 1)


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_atomic(path, b"old")

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == []
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_resolve_model_reads_one_path_from_standard_input(tmp_path):
    code = "from llmctl.checkpoint import resolve_model; print(resolve_model('-'))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=f"{tmp_path}\n", capture_output=True, text=True, check=False
    )
    assert run.stdout == f"{tmp_path}\n", run.stderr
    run = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, check=False)
    assert "a checkpoint path was expected" in run.stderr
    with pytest.raises(UserError, match="no such checkpoint"):
        resolve_model(tmp_path / "absent")


def test_lineage_round_trip_and_verification(tmp_path):
    save_tensors(tmp_path, {"a": torch.zeros(4)})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert lineage.read(tmp_path) is None and lineage.verify(tmp_path) == []
    made = lineage.Lineage("pretrain", {"steps": 3}, seed=7, metrics={"loss": 1.5})
    lineage.write(tmp_path, made)
    found = lineage.read(tmp_path)
    assert (found.command, found.recipe, found.seed, found.metrics) == ("pretrain", {"steps": 3}, 7, {"loss": 1.5})
    assert set(found.files) == {"config.json", "model.safetensors"} and lineage.verify(tmp_path) == []
    (tmp_path / "config.json").write_text("{ }")
    (tmp_path / "model.safetensors").unlink()
    problems = lineage.verify(tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["config.json", "model.safetensors"]


def test_lineage_covers_weights_in_files_of_their_own(tmp_path):
    """Those of an exported graph, and the two files of an exported program."""
    names = {"model.onnx", "model.onnx.data", "model.bin", "run.c"}
    for name in names:
        (tmp_path / name).write_bytes(b"weights")
    lineage.write(tmp_path, lineage.Lineage("export-onnx"))
    assert set(lineage.read(tmp_path).files) == names
    (tmp_path / "model.onnx.data").write_bytes(b"weightz")
    assert [problem.split(":")[0] for problem in lineage.verify(tmp_path)] == ["model.onnx.data"]


def test_lineage_and_files_load_no_torch():
    code = "import llmctl.lineage, llmctl.checkpoint, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
