"""Training what carries a state: fresh weights, what each optimizer takes, resuming, and the loss in transformers."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F

from llmctl.errors import Interrupted
from llmctl.models import shapes
from llmctl.models.config import parameter_count
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model
from llmctl.pretrain.settings import PretrainSettings
from llmctl.pretrain.task import pretraining
from llmctl.train import optim
from llmctl.train.events import Trained, Validated

FAMILIES = ("mamba", "mamba2", "lstm", "gru")
TINY = {
    "params": 80_000,
    "seq_len": 32,
    "batch_size": 4,
    "steps": 8,
    "precision": "fp32",
    "save_every": 4,
    "warmup_steps": 2,
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, write_tokens, some_texts):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "corpus.arrow", some_texts, held_out=20)


def run(output, *inputs, stop_at=None, resume=False, **changes):
    settings = PretrainSettings(**({} if resume else TINY) | changes, resume=resume)
    events = []
    with pretraining(settings, [str(path) for path in inputs], output, frozenset(changes)) as prepared:
        for event in prepared.run():
            events.append(event)
            if isinstance(event, Trained) and event.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
    return events


@pytest.mark.parametrize(
    "family", ["mamba", "lstm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mamba2", "gru"))]
)
def test_a_run_stopped_and_resumed_is_the_run_never_stopped(tmp_path, tokens, family):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, tokens, family=family)
    with pytest.raises(Interrupted):
        run(parts, tokens, family=family, log_every=1, stop_at=5)
    run(parts, resume=True)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_knows_no_context_limit(tmp_path, tokens, family):
    events = run(tmp_path / "run", tokens, family=family, steps=30, precision="bf16")
    losses = [event.loss for event in events if isinstance(event, Validated)]
    assert losses[-1] < 0.7 * math.log(258)
    model = load_model(tmp_path / "run")
    assert model.config.max_positions is None
    with torch.no_grad():
        assert model(torch.zeros(1, 5000, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_trained_model_has_the_same_loss_in_transformers(tmp_path, tokens, family):
    transformers = pytest.importorskip("transformers")
    run(tmp_path / "run", tokens, family=family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_model(tmp_path / "run")(ids)
        ours = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert abs(ours - theirs(ids, labels=ids).loss) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_takes_matrices_and_nothing_else_decays(family):
    model = new_model(shapes.for_parameters(family, 300_000, 258, 64), seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = optim.build(model, "muon", 0.01, 0.1, (0.9, 0.95), 0.01)
    matrices = {names[id(p)].rpartition("layers.0.mixer.")[2] for p in muon.param_groups[0]["params"]}
    expected = {
        "mamba": {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"},
        "mamba2": {"in_proj.weight", "out_proj.weight"},
        "lstm": {"weight_ih", "weight_hh"},
        "gru": {"weight_ih", "weight_hh"},
    }
    assert {name for name in matrices if "layers" not in name} == expected[family]
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups)
    assert sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", [1_000_000, 20_000_000])
def test_shapes_come_near_the_size_that_was_asked_for(family, wanted):
    config = shapes.for_parameters(family, wanted, 4096 if wanted > 5e6 else 258, 256)
    assert abs(parameter_count(config) - wanted) < 0.1 * wanted


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_fresh_state_space_begins_as_published(family):
    model = new_model(shapes.for_parameters(family, 5_000_000, 258, 64), seed=0)
    mixer = model.layers[0].mixer
    dt = F.softplus(mixer.dt_proj.bias if family == "mamba" else mixer.dt_bias)
    assert 1e-3 - 1e-6 < dt.min() and dt.max() < 0.1 + 1e-6 and (dt.log().std() > 0.8)
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    a = mixer.A_log.exp()
    if family == "mamba":
        torch.testing.assert_close(a, torch.arange(1.0, 17.0).expand_as(a))
    else:
        assert 1 <= a.min() and a.max() <= 16 and a.std() > 2
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
