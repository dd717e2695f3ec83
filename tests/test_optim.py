"""Loss and optimizers against torch's own, and accumulation against one large batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmctl.data.packing import IGNORE, Batch
from llmctl.models.initialization import new_model
from llmctl.models.shapes import for_parameters
from llmctl.train import loss as loss_module
from llmctl.train import optim
from llmctl.train.loop import Trainer
from llmctl.train.objectives import NextToken
from llmctl.train.schedule import Schedule

VOCAB = 96


# --- loss ---


def reference_loss(hidden_ND, head_VD, targets_N, z_loss):
    """The sum over targets, from all logits and autograd."""
    logits_NV = hidden_ND @ head_VD.mT
    nats = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
    log_z_N = torch.logsumexp(logits_NV, dim=-1)
    return nats + z_loss * (log_z_N.square() * (targets_N != IGNORE)).sum()


def some_targets(n, share_ignored, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets_N = torch.randint(0, VOCAB, (n,), generator=generator)
    targets_N[torch.rand(n, generator=generator) < share_ignored] = IGNORE
    return targets_N


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("rows_at_once", [1, 7, 50, 1000])
@pytest.mark.parametrize("share_ignored", [0.0, 0.4, 1.0])
def test_chunked_cross_entropy_is_torchs(monkeypatch, z_loss, rows_at_once, share_ignored):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", rows_at_once * VOCAB)
    hidden_ND = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    head_VD = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    targets_N = some_targets(50, share_ignored)
    mine = loss_module.cross_entropy(hidden_ND, head_VD, targets_N, z_loss)
    got = torch.autograd.grad(3 * mine, (hidden_ND, head_VD))
    theirs = reference_loss(hidden_ND, head_VD, targets_N, z_loss)
    expected = torch.autograd.grad(3 * theirs, (hidden_ND, head_VD))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_scored_losses_are_torchs(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 7 * VOCAB)
    hidden_ND, head_VD = torch.randn(50, 16), torch.randn(VOCAB, 16)
    targets_N = some_targets(50, 0.3)
    expected_N = F.cross_entropy(hidden_ND @ head_VD.mT, targets_N, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(loss_module.token_losses(hidden_ND, head_VD, targets_N), expected_N)


def test_cross_entropy_of_huge_logits_is_finite():
    hidden_ND = torch.full((4, 8), 200.0).requires_grad_()
    head_VD = torch.randn(VOCAB, 8)
    loss = loss_module.cross_entropy(hidden_ND, head_VD, torch.arange(4))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden_ND.grad).all()


# --- optimizers ---


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(32, 32), (32, 32), (64, 32), (32, 96)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_muon_is_torchs():
    mine, theirs = matrices(), matrices()
    ours = optim.Muon(mine, lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        for a, b, gradient in zip(mine, theirs, matrices(seed=step + 1)):
            a.grad, b.grad = gradient.detach().clone(), gradient.detach().clone()
        ours.step()
        reference.step()
    start = matrices()
    for a, b, first in zip(mine, theirs, start):
        moved = (b - first).norm()
        assert (a - b).norm() < 0.02 * moved  # both orthogonalize in bfloat16


@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 96)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = optim.orthogonalize(matrix[None])[0]
    inside = u.mT @ result @ vh.mT
    values = inside.diagonal()
    assert values.min() > 0.3 and values.max() < 1.3
    assert (inside - values.diag()).abs().max() < 1e-3


def tiny_model(family="llama", vocab=VOCAB):
    model = new_model(for_parameters(family, 30_000, vocab, 32), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_only_block_matrices_decay(family, name):
    model = tiny_model(family)
    optimizers = optim.build(model, name, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), embedding_lr=0.01)
    where = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in where
                where[id(parameter)] = (type(optimizer).__name__, group["lr"], group["weight_decay"])
    for parameter_name, parameter in model.named_parameters():
        kind, lr, decay = where[id(parameter)]
        is_matrix = parameter_name.startswith("layers.") and parameter.dim() == 2
        assert kind == ("Muon" if is_matrix and name == "muon" else "AdamW"), parameter_name
        assert decay == (0.1 if is_matrix else 0.0), parameter_name
        assert lr == (0.01 if parameter_name.startswith(("embed", "lm_head")) else 0.02), parameter_name


# --- steps ---


def batches_of(n_rows, seed=0):
    """Rows whose numbers of targets differ much, some with none at all."""
    random = np.random.default_rng(seed)
    inputs, targets = random.integers(0, VOCAB, (2, n_rows, 16))
    for row in range(n_rows):
        targets[row, random.integers(0, 17) :] = IGNORE
    targets[0] = IGNORE
    return inputs, targets


def trainer_for(model, optimizer="adamw", **settings):
    optimizers = optim.build(model, optimizer, 0.003, 0.1, (0.9, 0.95), 0.003)
    schedule = Schedule("wsd", warmup_steps=0, decay=0.5, floor=0.0)
    objective = NextToken(model, z_loss=settings.pop("z_loss", 1e-3))
    return Trainer(objective, optimizers, schedule, torch.device("cpu"), torch.float32, total_steps=100, **settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_change_nothing(optimizer):
    inputs, targets = batches_of(12)
    n_targets = int((targets != IGNORE).sum())
    results = {}
    for size in (12, 5, 4, 1):
        trainer = trainer_for(tiny_model(), optimizer)
        batches = [Batch(inputs[at : at + size], targets[at : at + size], None) for at in range(0, 12, size)]
        result = trainer.step(batches, n_targets)
        results[size] = result, torch.cat([p.detach().flatten() for p in trainer.objective.parameters()])
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    moved = (results[12][1] - start).norm()
    for result, weights in results.values():
        assert result.loss == pytest.approx(results[12][0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(results[12][0].grad_norm, rel=1e-5)
        # Adam's first step is the gradient's sign, so that rounding may turn an entry that is all but zero
        assert (weights - results[12][1]).norm() < 2e-2 * moved


def test_the_gradient_of_a_step_is_that_of_the_mean_over_all_targets():
    inputs, targets = batches_of(6, seed=3)
    n_targets = int((targets != IGNORE).sum())
    model = tiny_model()
    reference = copy.deepcopy(model)
    hidden_ND = reference.hidden(torch.from_numpy(inputs)).flatten(0, 1)
    loss = reference_loss(hidden_ND, reference.head_weight, torch.from_numpy(targets).flatten(), 1e-3) / n_targets
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    trainer = trainer_for(model, clip=0.0)
    result = trainer.step([Batch(inputs[:1], targets[:1], None), Batch(inputs[1:], targets[1:], None)], n_targets)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_a_step_clips_to_the_norm():
    inputs, targets = batches_of(6, seed=3)
    n_targets = int((targets != IGNORE).sum())
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = trainer_for(tiny_model(), clip=clip)
        seen = []
        trainer.optimizers[0].register_step_pre_hook(lambda o, *_, seen=seen: seen.extend(
            p.grad.norm() for group in o.param_groups for p in group["params"]))  # fmt: skip
        result = trainer.step([Batch(inputs, targets, None)], n_targets)
        norms[clip] = torch.stack(seen).norm().item()
        assert result.grad_norm == pytest.approx(norms[0.0], rel=1e-4)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3) and norms[0.0] > 0.01


def test_activation_checkpointing_changes_nothing():
    inputs, targets = batches_of(4, seed=5)
    results = []
    for is_on in (False, True):
        model = tiny_model()
        model.activation_checkpointing = is_on
        results.append(trainer_for(model).step([Batch(inputs, targets, None)], int((targets != IGNORE).sum())))
    assert results[0].loss == results[1].loss
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_schedules_rise_to_the_peak_and_fall_to_the_floor(kind):
    schedule = Schedule(kind, warmup_steps=10, decay=0.5, floor=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:11] == sorted(factors[:11]) and factors[10] == 1.0 and factors[0] == pytest.approx(1 / 11)
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0.1 <= factors[99] < 0.13
    assert [schedule.factor(step, None) for step in range(50)] == factors[:11] + [1.0] * 39
    half = {"cosine": 0.55, "linear": 0.55, "wsd": 1.0}[kind]
    assert schedule.factor(55, 100) == pytest.approx(half, abs=0.1)
