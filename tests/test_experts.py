"""Training mixtures of experts: the load-balancing loss, however a batch is cut and its activations are kept."""

from __future__ import annotations

import json

import pytest
import torch

from llmctl.models.ffn import balance_loss
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model, read_config
from llmctl.pretrain.settings import PretrainSettings
from llmctl.pretrain.task import pretraining
from llmctl.train.events import Trained

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("mixtral") / "config.json"
    file.write_text(json.dumps(MIXTRAL))
    return file


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, write_tokens, some_texts):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "corpus.arrow", some_texts, held_out=20)


def train(output, tokens, **changes):
    """The reports of a short run."""
    usual = {"seq_len": 32, "batch_size": 4, "steps": 6, "precision": "fp32", "log_every": 1, "warmup_steps": 2}
    settings = PretrainSettings(**usual | changes)
    with pretraining(settings, [str(tokens)], output, frozenset()) as prepared:
        return [event for event in prepared.run() if isinstance(event, Trained)]


def gradients(model, ids):
    model.train()
    loss = model(ids).float().logsumexp(-1).mean()
    balance = balance_loss(model)
    (loss + balance).backward()
    assert balance_loss(model) is None, "it is taken once"
    return balance.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_activation_checkpointing_changes_no_gradient(config_file):
    config, ids = read_config(config_file), torch.arange(48).view(2, 24)
    plain, recomputed = new_model(config, seed=0), new_model(config, seed=0)
    recomputed.activation_checkpointing = True
    balance, expected = gradients(plain, ids)
    same, found = gradients(recomputed, ids)
    assert balance == same > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)


def test_without_choice_the_balance_is_even(config_file):
    """All router outputs equal: every expert has the probability 1 / n, and the loss is its coefficient times top_k."""
    model = new_model(read_config(config_file), seed=0).train()
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.router.weight.zero_()
    model(torch.arange(24)[None])
    assert balance_loss(model).item() == pytest.approx(0.02 * 2)


def test_a_run_reports_it_apart_and_accumulates(config_file, tokens, tmp_path):
    once = train(tmp_path / "once", tokens, model_config=str(config_file))
    cut = train(tmp_path / "cut", tokens, model_config=str(config_file), micro_batch_size=1)
    assert all(0.02 * 1.9 < event.balance_loss < 0.02 * 4 for event in (*once, *cut))
    # The balance is judged within each micro batch, so that runs part ways, slowly.
    assert cut[0].loss == pytest.approx(once[0].loss, abs=1e-5)
    assert cut[-1].loss == pytest.approx(once[-1].loss, abs=0.02)
    lines = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["balance_loss"] == once[0].balance_loss
    assert load_model(tmp_path / "once").config.blocks[0].ffn.n_experts == 4


def test_models_without_experts_have_no_balance(tokens, tmp_path):
    assert {event.balance_loss for event in train(tmp_path / "dense", tokens, params=60_000, steps=2)} == {None}
