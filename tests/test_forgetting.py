"""What fine-tuning keeps: earlier tasks scored and replayed, teachers, the best save, and when it stops."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_finetune_command import IDS, SHORT, base, chats, finetune, sha  # noqa: F401

from llmctl.errors import UserError
from llmctl.finetune.distillation import Distilled, Teacher, refuse_teacher
from llmctl.finetune.labelled import Classification, Regression, Reward
from llmctl.finetune.neftune import add_noise
from llmctl.finetune.objectives import RULES, Comparison
from llmctl.finetune.settings import PreferenceSettings
from llmctl.models.config import Classifier
from llmctl.models.loading import load_model, read_config
from llmctl.train.best import Best
from llmctl.train.events import Validated
from llmctl.train.objectives import NextToken


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    file = tmp_path_factory.mktemp("earlier") / "earlier.txt"
    file.write_text("\n\n".join(f"The {n} cats sat on the mat and sang." for n in range(200)))
    return file


def test_an_earlier_task_is_scored_and_replayed(base, chats, earlier, tmp_path):  # noqa: F811
    flags = [*SHORT, "--steps", "20", "--lr", "0.02", "--retain", earlier]
    shares = {}
    for name, more in (("plain", []), ("replayed", ["--replay", f"{earlier}:0.5"])):
        done = finetune(base, chats, "-o", tmp_path / name, *flags, *more)
        assert done.returncode == 0, done.stderr
        assert "before and after" in done.stderr and "earlier task" in done.stderr
        metrics = json.loads((tmp_path / name / "llmctl.json").read_text())["metrics"]
        assert metrics["after"]["held-out rows"] == metrics["validation_loss"]
        shares[name] = metrics["before"], metrics["after"]
    (before, plain), (same, replayed) = shares.values()
    assert before == same, "neither what is held out nor what is scored knows of the replay"
    assert replayed["earlier task"] < plain["earlier task"]


def test_early_stopping_and_the_best_save(base, chats, tmp_path):  # noqa: F811
    flags = [
        *SHORT,
        "--steps",
        "40",
        "--validate-every",
        "4",
        "--early-stopping",
        "2",
        "--keep-best",
        "--method",
        "full",
    ]
    done = finetune(base, chats, "-o", tmp_path / "out", *flags, "--lr", "0.1", "--schedule", "wsd", "--decay", "0")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {
        record["step"]: record["loss"] for record in records if record["event"] == "validation" and record["step"]
    }
    best = min(losses, key=losses.get)
    metrics = json.loads((tmp_path / "out" / "llmctl.json").read_text())["metrics"]
    assert metrics["step"] == best and metrics["validation_loss"] == losses[best]
    assert max(losses) == best + 8 < 40 and "no better" in done.stderr
    kept = tmp_path / "out" / "trainer" / f"step-{best:08}" / "model.safetensors"
    assert sha(kept) == sha(tmp_path / "out" / "model.safetensors")


def test_the_best_is_judged_once_for_each_step():
    best = Best()
    losses = [(4, 3.0), (8, 2.0), (8, 2.0), (12, 2.5), (12, 2.5), (16, 2.0)]
    assert [best.improves(Validated(step, loss, None, 0.0)) for step, loss in losses] == [
        *(True, True, False),
        *(False, False, False),
    ]
    assert (best.step, best.waited, best.numbers) == (8, 2, {"loss": 2.0})


def test_a_teacher_adds_its_divergence(base):  # noqa: F811
    student, teacher = load_model(base), load_model(base)
    targets = IDS.roll(-1, 1)
    targets[:, -3:] = -100
    plain = NextToken(student, 0.0).train()
    alone = plain(IDS, targets)
    assert torch.allclose(Distilled(plain, Teacher(teacher, 2.0, 3.0)).train()(IDS, targets), alone, rtol=1e-5)
    with torch.no_grad():
        teacher.embed_tokens.weight.mul_(1.5)
        logprobs = [(model(IDS)[:, :-3] / 3.0).log_softmax(-1) for model in (teacher, student)]
        expected = 9.0 * (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum()
    found = Distilled(plain, Teacher(teacher, 2.0, 3.0)).train()(IDS, targets) - alone
    assert torch.allclose(found, 2.0 * expected, rtol=1e-3)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(Distilled(plain, Teacher(teacher, 2.0, 3.0)).eval()(IDS, targets), plain.eval()(IDS, targets))


def test_a_teacher_of_answers_adds_its_divergence_per_token(base):  # noqa: F811
    student, teacher, settings = load_model(base), load_model(base), PreferenceSettings()
    with torch.no_grad():
        teacher.embed_tokens.weight.mul_(1.5)
    targets = IDS.roll(-1, 1)
    targets[:, -3:] = -100
    batch = IDS, targets, torch.tensor([30, 30]), None, torch.tensor([True])
    alone = Comparison(student, RULES["simpo"], settings, None).train()(*batch)
    found = Comparison(student, RULES["simpo"], settings, None, Teacher(teacher, 2.0, 3.0)).train()(*batch) - alone
    with torch.no_grad():
        logprobs = [(model(IDS)[:, :-3] / 3.0).log_softmax(-1) for model in (teacher, student)]
        expected = 9.0 * (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1).mean()
    assert torch.allclose(found, 2.0 * expected, rtol=1e-3)


LABEL_CASES = {
    "one of three": ("single_label_classification", 3, torch.tensor([2, 0])),
    "any of three": ("multi_label_classification", 3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    "values": ("regression", 1, torch.tensor([3.0, 8.0])),
    "pairs": ("regression", 1, None),
}


@pytest.mark.parametrize("problem,count,labels", LABEL_CASES.values(), ids=LABEL_CASES)
def test_a_teacher_of_labels_adds_its_divergence(base, problem, count, labels):  # noqa: F811
    spec = Classifier(tuple("abc")[:count], problem, at="last", dense=False, bias=False, pad_id=0)
    student, teacher = load_model(base, classifier=spec), load_model(base, classifier=spec)
    for seed, model in enumerate((student, teacher)):
        torch.nn.init.normal_(model.classifier.out.weight, generator=torch.Generator().manual_seed(seed))
    kind = Reward if labels is None else Regression if problem == "regression" else Classification
    objective = Regression(student, np.array([1.0, 5.0]), False) if kind is Regression else kind(student)
    batch = IDS, None, torch.tensor([30, 30]), labels, torch.ones(1 if labels is None else 2, dtype=torch.bool)
    alone = objective.train()(*batch)
    objective.learn_from(Teacher(teacher, 2.0, 3.0))
    found = objective(*batch) - alone
    with torch.no_grad():
        theirs, ours = teacher(IDS), student(IDS)
        if kind is Regression:
            expected = (ours - theirs / 2.0).square().sum()
        else:
            theirs, ours = ((s[:1] - s[1:]) if kind is Reward else s for s in (theirs, ours))
            if kind is not Classification or problem.startswith("multi"):
                theirs, ours = (torch.distributions.Bernoulli(logits=s / 3.0) for s in (theirs, ours))
                expected = 9.0 * torch.distributions.kl_divergence(theirs, ours).mean(1).sum()
            else:
                theirs, ours = (torch.distributions.Categorical(logits=s / 3.0) for s in (theirs, ours))
                expected = 9.0 * torch.distributions.kl_divergence(theirs, ours).sum()
    assert found.item() == pytest.approx(2.0 * expected.item(), rel=1e-3)


@pytest.mark.parametrize("other,said", [({"vocab_size": 300}, "300"), ({"max_positions": 8}, "reads 8")])
def test_a_teacher_that_cannot_read_along_is_refused(base, other, said):  # noqa: F811
    config = read_config(base)
    refuse_teacher(config, config, 16)
    with pytest.raises(UserError, match=said):
        refuse_teacher(dataclasses.replace(config, **other), config, 16)
    spec = Classifier(("a", "b"), "single_label_classification", at="last", dense=False, bias=False, pad_id=0)
    refuse_teacher(config.classifying(spec), config.classifying(spec), 16)
    for teacher in (config, config.classifying(dataclasses.replace(spec, labels=("a", "c")))):
        with pytest.raises(UserError, match="the teacher's head is"):
            refuse_teacher(teacher, config.classifying(spec), 16)
    with pytest.raises(UserError, match="that of a classifier"):
        refuse_teacher(config.classifying(spec), config, 16)


def test_noise_is_in_training_only_and_of_its_size(base):  # noqa: F811
    model = load_model(base)
    plain = model.embed(IDS)
    add_noise(model, 5.0)
    assert torch.equal(model.eval().embed(IDS), plain)
    noise = model.train().embed(IDS) - plain
    limit = 5.0 / (IDS.shape[1] * plain.shape[-1]) ** 0.5
    assert 0.9 * limit < noise.abs().max() <= limit * 1.001


@pytest.mark.parametrize(
    "words,code,said",
    [
        (["--replay", "earlier.txt"], 2, "share"),
        (["--retain", "no-such.txt"], 1, "no-such.txt"),
        (["--objective", "dpo", "--teacher", "x"], 1, "prompt"),
    ],
)
def test_bad_calls(base, chats, tmp_path, words, code, said):  # noqa: F811
    done = finetune(base, chats, "-o", tmp_path / "out", *SHORT, *words)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
