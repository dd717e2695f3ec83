"""A training run as a property: however it is interrupted, it ends in the same bits, and nothing that was saved is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal

import pytest
import torch

from llmctl.errors import CalledWrongly, Interrupted, UserError
from llmctl.models import shapes
from llmctl.models.causal_lm import CausalLM
from llmctl.models.config import parameter_count
from llmctl.models.loading import load_model
from llmctl.pretrain.settings import PretrainSettings
from llmctl.pretrain.task import pretraining
from llmctl.tokenizer import Tokenizer
from llmctl.train.events import Finished, Planned, Saved, Started, Trained, Validated
from llmctl.train.loop import Trainer

STEPS = 12
TINY = {
    "params": 60_000,
    "seq_len": 32,
    "batch_size": 4,
    "steps": STEPS,
    "precision": "fp32",
    "log_every": 3,
    "save_every": 4,
    "validate_every": 4,
    "warmup_steps": 2,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, write_tokens, some_texts):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "corpus.arrow", some_texts, held_out=20)


def run(output, *inputs, at_event=None, resume=False, **changes):
    """All events of a run; `at_event` sees each one as it comes. On resume only the `changes` count as given."""
    settings = PretrainSettings(**({} if resume else TINY) | changes, resume=resume)
    events = []
    with pretraining(settings, [str(path) for path in inputs], output, frozenset(changes)) as prepared:
        for event in prepared.run():
            events.append(event)
            if at_event:
                at_event(event)
    return events


def interrupt_at(step, number=signal.SIGTERM):
    """Sends the signal from within the run, when it reports a step (or the first one after it)."""
    sent = []

    def at_event(event):
        if isinstance(event, (Trained, Saved)) and event.step >= step and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    return at_event


def sha256(output):
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def metrics(output):
    """The records without what a clock or the memory has to say."""
    times = ("tokens_per_second", "mfu", "seconds", "memory_bytes")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in times} for record in records]


def validations(output):
    return [record for record in metrics(output) if record["event"] == "validation"]


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


# --- resume ---

KINDS = {
    "muon": {},
    "adamw with dropout": {"optimizer": "adamw", "dropout": 0.1},
    "gpt2 in micro batches": {"family": "gpt2", "micro_batch_size": 3, "dropout": 0.1},
    "bf16, cosine, z-loss, checkpointing": {
        "precision": "bf16",
        "schedule": "cosine",
        "z_loss": 1e-4,
        "activation_checkpointing": True,
    },  # fmt: skip
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_and_resumed_is_the_run_never_stopped(tmp_path, tokens, kind):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, tokens, **KINDS[kind])
    with pytest.raises(Interrupted) as caught:
        run(parts, tokens, **KINDS[kind], log_every=1, at_event=interrupt_at(5))
    assert caught.value.exit_code == 143
    with pytest.raises(Interrupted) as caught:
        run(parts, resume=True, log_every=3, at_event=interrupt_at(8, signal.SIGINT))
    assert caught.value.exit_code == 130
    events = run(parts, resume=True)
    assert of_kind(events, Started)[0].step in (8, 9)
    assert sha256(parts) == sha256(whole)
    assert validations(parts) == validations(whole)


@pytest.mark.parametrize("step", [1, 4, 11, 12])
def test_the_reports_of_a_resumed_run_are_those_of_one_never_stopped(tmp_path, tokens, step):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, tokens, dropout=0.1)

    original = Trainer.step

    def stepping(self, *arguments):
        result = original(self, *arguments)
        if self.step_number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stepping)
        with pytest.raises(Interrupted):
            run(parts, tokens, dropout=0.1)
    run(parts, resume=True)
    assert sha256(parts) == sha256(whole)
    assert metrics(parts) == metrics(whole)


def test_a_signal_ends_a_validation_too(tmp_path, tokens):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, tokens)
    with pytest.raises(Interrupted):  # at the last step: what is left is the last validation
        run(parts, tokens, at_event=lambda e: isinstance(e, Saved) and e.step == STEPS and os.kill(os.getpid(), 15))
    assert not (parts / "llmctl.json").exists()
    run(parts, resume=True)
    assert sha256(parts) == sha256(whole) and metrics(parts) == metrics(whole)
    assert (parts / "llmctl.json").exists()


def test_resume_starts_where_nothing_was_saved_and_does_nothing_where_all_is_done(tmp_path, tokens):
    fresh, again = tmp_path / "fresh", tmp_path / "again"
    run(fresh, tokens)
    run(again, tokens, resume=True, **TINY)
    assert sha256(again) == sha256(fresh)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    events = run(again, resume=True)
    assert [type(event) for event in events] == [Finished] and events[0].step == STEPS
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*")} == before


def test_resume_refuses_by_name_what_would_change_the_run(tmp_path, tokens, write_tokens, some_texts):
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(output, tokens, at_event=interrupt_at(4))
    for changes, named in (
        ({"steps": 99}, "--steps 99: the run to resume has 12"),
        ({"learning_rate": 0.5}, "--learning-rate 0.5"),
        ({"optimizer": "adamw"}, "--optimizer adamw: the run to resume has muon"),
        ({"dropout": 0.5}, "--dropout"),
        ({"overwrite": True}, "--resume and --overwrite"),
    ):
        with pytest.raises(CalledWrongly, match=named):
            run(output, resume=True, **changes)
    other = write_tokens(tmp_path / "other.arrow", some_texts[:100])
    with pytest.raises(UserError, match="the run began with the tokens"):
        run(output, other, resume=True)
    moved = tokens.rename(tmp_path / "moved.arrow")  # the same tokens may lie elsewhere
    try:
        run(output, moved, resume=True, keep=2, steps=STEPS)
    finally:
        moved.rename(tokens)
    assert len(list((output / "trainer").glob("step-*"))) == 2


def test_a_run_that_goes_on_under_other_versions_says_so_in_one_line(tmp_path, tokens, caplog):
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(output, tokens, at_event=interrupt_at(4))
    plan_file = output / "trainer" / "plan.json"
    plan = json.loads(plan_file.read_text())
    plan["versions"] |= {"torch": "1.0", "code": "0123456789ab"}
    plan_file.write_text(json.dumps(plan))
    with caplog.at_level("WARNING", logger="llmctl"):
        run(output, resume=True)
    (record,) = [record for record in caplog.records if "the run began with" in record.message]
    assert "torch 1.0, now 2" in record.message and "code 0123456789ab, now" in record.message
    assert "python" not in record.message


def test_a_time_budget_becomes_steps_once(tmp_path, tokens):
    """A run killed before its first save goes on with the number that is on record, known from the same step on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = {"steps": None, "time": 4.0, "schedule": "cosine", "save_every": 1000}
    run(whole, tokens, **changes)
    plan = json.loads((whole / "trainer" / "plan.json").read_text())
    assert plan["length_fixed_at"] > 2 and plan["total_steps"] > plan["length_fixed_at"]
    (killed / "trainer").mkdir(parents=True)
    (killed / "trainer" / "plan.json").write_text(json.dumps(plan))
    events = run(killed, resume=True)
    assert [event.total_steps for event in of_kind(events, Planned)] == [plan["total_steps"]]
    assert sha256(killed) == sha256(whole)
    assert metrics(killed) == metrics(whole)


# --- crashes and full disks ---

DISK_CALLS = ("replace", "rename", "link", "fsync", "unlink")


class FailingDisk:
    """Counts what changes the disk, and lets one call fail."""

    def __init__(self, patch, at=None, fail=None):
        self.count, self.at, self.fail = 0, at, fail
        for name in DISK_CALLS:
            patch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, original):
        def call(*arguments, **keywords):
            self.count += 1
            if self.count == self.at:
                self.fail()
            return original(*arguments, **keywords)

        return call


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tokens):
    """A run never stopped, and how many calls it makes that change the disk."""
    output = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch)
        run(output, tokens, **SHORT)
    return output, disk.count


SHORT = {"steps": 5, "save_every": 2, "validate_every": 2, "log_every": 2}


def dies_before_call(at, output, tokens):
    """Run in a child that ends like `kill -9` before a call that changes the disk."""
    child = os.fork()
    if child == 0:
        try:
            FailingDisk(pytest.MonkeyPatch(), at, lambda: os._exit(9))
            run(output, tokens, **SHORT)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def check_every(stride, reference, tokens, tmp_path):
    whole, n_calls = reference
    assert n_calls > 40
    for at in range(1, n_calls + 1, stride):
        output = tmp_path / f"killed-{at}"
        assert dies_before_call(at, output, tokens)
        if (output / "model.safetensors").exists():
            load_model(output)
        has_plan = (output / "trainer" / "plan.json").exists()
        run(output, tokens, resume=True, **({} if has_plan else TINY | SHORT))
        assert sha256(output) == sha256(whole), at
        assert metrics(output) == metrics(whole), at
        leftovers = [path for path in output.rglob("*") if "partial" in path.name]
        assert leftovers == [], at


def test_a_run_killed_at_any_change_of_the_disk_resumes_to_the_same_bits(reference, tokens, tmp_path):
    check_every(11, reference, tokens, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_every_other_change_of_the_disk_resumes_to_the_same_bits(reference, tokens, tmp_path):
    check_every(2, reference, tokens, tmp_path)


def test_a_disk_that_fills_in_the_middle_of_a_save_keeps_the_last_one(reference, tokens, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch)

        def at_event(event):
            if isinstance(event, Saved) and event.step == 4:  # the save of the last step meets a full disk
                disk.at, disk.fail = disk.count + 4, no_room

        def no_room():
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(UserError, match="save of step 5 failed: No space.*the save of step 4 is intact") as caught:
            run(output, tokens, **SHORT, at_event=at_event)
    assert "--resume" in caught.value.hint
    AutoModelForCausalLM.from_pretrained(output)
    assert [path.name for path in (output / "trainer").glob("*step*")] == ["step-00000004"]
    run(output, resume=True)
    assert sha256(output) == sha256(reference[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_save(tmp_path, tokens, optimizer):
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"step \d+: the loss is (nan|inf)") as caught:
        run(output, tokens, optimizer=optimizer, learning_rate=1e38, warmup_steps=0, save_every=1, log_every=1)
    assert "last save is kept" in caught.value.hint
    model = load_model(output)
    assert all(math.isfinite(record["loss"]) for record in metrics(output))
    assert model.config.vocab_size == 257


# --- what is refused, and leaves nothing behind ---


def test_refused_starts_leave_nothing_behind(tmp_path, tokens, write_tokens, some_texts):
    output = tmp_path / "out"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
                                  "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}))  # fmt: skip
    broken = tmp_path / "broken.arrow"
    broken.write_bytes(tokens.read_bytes()[:-100])
    short = write_tokens(tmp_path / "short.arrow", ["a few words"])
    held_out = write_tokens(tmp_path / "held-out.arrow", some_texts[:10], held_out=10)
    for inputs, changes, error, message in (
        ([tokens], {"params": None, "model_config": str(config)}, UserError, "vocabulary of 257, the model has 100"),
        ([tokens], {"params": None, "model_config": str(tmp_path / "no.json")}, UserError, "No such file"),
        ([short], {}, UserError, "12 tokens, one sequence needs 33"),
        ([held_out], {}, UserError, "no training tokens"),
        ([broken], {}, UserError, "truncated stream"),
        ([tmp_path / "absent.arrow"], {}, UserError, "No such file"),
        ([tokens], {"device": "cuda"}, CalledWrongly, "device 'cuda' cannot be used"),
        ([tokens], {"device": "potato"}, CalledWrongly, "device 'potato' cannot be used"),
        ([tokens], {"tokens": 1000}, CalledWrongly, "--steps and --tokens"),
        ([tokens], {"preset": "gpt2"}, CalledWrongly, "--params and --preset"),
        ([tokens], {"params": None, "preset": "tinyllama", "family": "gpt2"}, CalledWrongly, "--family gpt2"),
        ([tokens], {"params": 10**12}, UserError, "out of memory: .* parameters .* are free"),
        ([tokens], {"batch_size": 10**10}, UserError, "out of memory: 10000000000 sequences at once .* are free"),
    ):
        if changes.get("device") == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(error, match=message) as caught:
            run(output, *inputs, **changes)
        assert type(caught.value) is error
        assert not output.exists(), message


def test_an_output_that_exists_is_kept_until_the_new_run_can_start(tmp_path, tokens, write_tokens):
    output = tmp_path / "out"
    run(output, tokens)
    with pytest.raises(CalledWrongly, match="exists already"):
        run(output, tokens)
    before = sha256(output)
    short = write_tokens(tmp_path / "short.arrow", ["a few words"])
    with pytest.raises(UserError, match="one sequence needs"):
        run(output, short, overwrite=True)
    assert sha256(output) == before and (output / "llmctl.json").exists()
    run(output, tokens, overwrite=True, seed=1)
    assert sha256(output) != before and metrics(output)[0]["step"] == 3
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for changes, message in (({"overwrite": True}, "no training output"), ({"resume": True}, "no training run")):
        with pytest.raises(CalledWrongly, match=message):
            run(foreign, tokens, **changes)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_run_that_overwrites_takes_nothing_from_what_was_there(tmp_path, tokens):
    parent, output, fresh = tmp_path / "parent", tmp_path / "out", tmp_path / "fresh"
    run(parent, tokens, seed=1)
    for changes in ({}, {"params": None, "init_from": str(parent)}):
        run(output, tokens, steps=5, overwrite=True)
        run(output, tokens, **changes, steps=3, overwrite=True)
        run(fresh, tokens, **changes, steps=3, overwrite=True)
        assert sha256(output) == sha256(fresh)


def test_one_process_trains_in_an_output(tmp_path, tokens):
    output = tmp_path / "out"

    def at_event(event):
        if isinstance(event, Saved):
            with pytest.raises(UserError, match="another process is training here"):
                run(output, resume=True)

    run(output, tokens, at_event=at_event)


def test_the_tokenizer_must_be_the_parents(tmp_path, tokens, write_tokens, some_texts):
    parent, child = tmp_path / "parent", tmp_path / "child"
    run(parent, tokens)
    bpe = Tokenizer.train_bpe(some_texts, 300)
    other = write_tokens(tmp_path / "bpe.arrow", some_texts, tokenizer=bpe)
    with pytest.raises(UserError, match=f"tokenizer {bpe.sha256[:12]}.*{Tokenizer.bytes().sha256[:12]}"):
        run(child, other, params=None, init_from=str(parent))
    assert not child.exists()


# --- what comes out ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_checkpoint_scores_the_same_in_transformers(tmp_path, tokens, some_texts, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "out"
    events = run(output, tokens, family=family, steps=30, seq_len=64)
    validated = of_kind(events, Validated)[-1]
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.float32 and tokenizer.eos_token == "<|endoftext|>"
    ids = [tokenizer.eos_token_id]
    for text in some_texts[-20:]:
        ids += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    nats, seen_by = 0.0, Tokenizer.load(output)
    assert ids[1:] == seen_by.encode_documents(some_texts[-20:])[0].tolist()
    # as validation does: rows of 64, and within a row each document by itself, after the end token in front of it
    for at in range(0, len(ids) - 1, 64):
        row = ids[at : at + 65]
        borders = [0, *[i for i in range(1, len(row) - 1) if row[i] == tokenizer.eos_token_id], len(row) - 1]
        for first, last in zip(borders, borders[1:]):
            if last > first:
                part = torch.tensor([row[first : last + 1]])
                with torch.no_grad():
                    logits = model(part[:, :-1]).logits[0]
                nats += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
    assert validated.loss == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    n_bytes = sum(len(text.encode()) for text in some_texts[-20:])
    assert validated.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)
    assert validated.loss < 3.5


def test_init_from_goes_on_with_the_parents_weights(tmp_path, tokens):
    parent, child = tmp_path / "parent", tmp_path / "child"
    before = run(parent, tokens, steps=40)
    unchanged = sha256(parent)
    shape = {"params": None, "init_from": str(parent)}
    events = run(child, tokens, **shape, learning_rate=1e-9, dropout=0.1)
    assert of_kind(events, Validated)[-1].loss == pytest.approx(of_kind(before, Validated)[-1].loss, abs=1e-3)
    assert sha256(parent) == unchanged
    lineage = json.loads((child / "llmctl.json").read_text())
    assert lineage["parent_sha256"] and lineage["command"] == "pretrain" and lineage["recipe"]["total_steps"] == STEPS
    config = json.loads((child / "config.json").read_text())
    assert config["hidden_size"] == json.loads((parent / "config.json").read_text())["hidden_size"]


def test_a_resumed_run_needs_its_parent_no_more(tmp_path, tokens):
    parent, child, whole = tmp_path / "parent", tmp_path / "child", tmp_path / "whole"
    run(parent, tokens)
    shape = {"params": None, "init_from": str(parent), "dropout": 0.2}
    run(whole, tokens, **shape)
    with pytest.raises(Interrupted):
        run(child, tokens, **shape, at_event=interrupt_at(4))
    parent.rename(tmp_path / "elsewhere")
    run(child, resume=True)
    assert sha256(child) == sha256(whole)
    assert json.loads((child / "llmctl.json").read_text())["parent_sha256"]


def test_dropout_reaches_every_layer_of_a_continued_model(tmp_path, tokens):
    parent = tmp_path / "parent"
    run(parent, tokens)
    settings = PretrainSettings(**TINY | {"params": None, "init_from": str(parent), "dropout": 0.3, "dry_run": True})
    with pretraining(settings, [str(tokens)], tmp_path / "child") as prepared:
        prepared.dry_run()
        model = prepared.stepping.trainer.objective.model
    assert {block.dropout for block in model.layers} == {block.mixer.dropout for block in model.layers} == {0.3}


def test_keep_keeps_that_many_saves(tmp_path, tokens):
    run(tmp_path / "out", tokens, keep=2, save_every=3)
    saves = sorted(path.name for path in (tmp_path / "out" / "trainer").glob("step-*"))
    assert saves == ["step-00000009", "step-00000012"]


def test_a_dry_run_writes_nothing_and_tells_what_a_run_will_be(tmp_path, tokens):
    settings = PretrainSettings(**TINY | {"dry_run": True, "steps": 50})
    with pretraining(settings, [str(tokens)], tmp_path / "out") as prepared:
        found = prepared.dry_run()
    assert list(tmp_path.iterdir()) == []
    events = run(tmp_path / "out", tokens, steps=50)
    started = of_kind(events, Started)[0]
    assert (found["parameters"], found["shape"], found["tokens_per_step"]) == (
        started.n_parameters, started.shape, started.tokens_per_step)  # fmt: skip
    assert found["steps"] == 50 and found["epochs"] == pytest.approx(of_kind(events, Planned)[0].epochs)
    assert found["flops"] == pytest.approx(6 * found["parameters"] * 128 * 50, rel=0.5)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out" / "trainer" / "step-00000050").iterdir())
    assert found["disk_bytes"] == pytest.approx(2 * on_disk, rel=0.2)
    assert found["seconds"] == pytest.approx(50 * found["tokens_per_step"] / found["tokens_per_second"])
    assert 1e8 < found["memory_bytes"] < 1e10


# --- shapes ---


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2", 124.4), ("gpt2-medium", 354.8), ("tinyllama", 1100.0), ("llama-160m", 162.4)]
)
def test_presets_have_the_parameters_that_they_are_known_for(name, millions):
    vocab = 50257 if name.startswith("gpt2") else 32000
    config = shapes.preset(name, vocab, 1024)
    with torch.device("meta"):
        model = CausalLM(config)
    n = sum(parameter.numel() for parameter in model.parameters())
    assert n == parameter_count(config)
    if name != "llama-160m":
        assert n / 1e6 == pytest.approx(millions, rel=0.002)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "n", [300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 124_000_000, 350_000_000, 1_000_000_000]
)
def test_a_wanted_number_of_parameters_is_met(family, n):
    vocab = 257 if n < 10**6 else 8192 if n < 10**8 else 32000
    config = shapes.for_parameters(family, n, vocab if n != 1_000_000 else 2048, 256)
    assert parameter_count(config) == pytest.approx(n, rel=0.15)
    mixer = config.blocks[0].mixer
    assert mixer.n_heads * mixer.head_dim == config.d_model and mixer.n_heads % mixer.n_kv_heads == 0
