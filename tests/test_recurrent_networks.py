"""LSTM and GRU language models against torch.nn.LSTM and torch.nn.GRU with the weights of a checkpoint of ours."""

from __future__ import annotations

from types import SimpleNamespace

import family_checks as checks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmctl.checkpoint import open_tensors
from llmctl.files import read_json
from llmctl.models import families
from llmctl.models.config import parameter_count
from llmctl.models.initialization import new_model
from llmctl.models.loading import load_model, save_model

CONFIGS = {
    "lstm": {"model_type": "lstm", "n_layers": 2},
    "lstm-untied": {"model_type": "lstm", "n_layers": 1, "tie_word_embeddings": False, "norm_eps": 1e-3},
    "gru": {"model_type": "gru", "n_layers": 3},
    "gru-untied": {"model_type": "gru", "n_layers": 1, "tie_word_embeddings": False},
}


class TorchModel(nn.Module):
    """The model as torch's own layers, from the files of a checkpoint alone."""

    def __init__(self, directory):
        super().__init__()
        self.config, stored = read_json(directory / "config.json"), open_tensors(directory)
        self.tensors = {name: stored.get(name).clone().requires_grad_() for name in stored.keys()}
        width, cell = self.config["d_model"], self.config["model_type"].upper()
        self.layers = nn.ModuleList(
            getattr(nn, cell)(width, width, batch_first=True) for _ in range(self.config["n_layers"])
        )
        for i, layer in enumerate(self.layers):
            layer.load_state_dict(
                {name: self.tensors[f"layers.{i}.rnn.{name}"] for name, _ in layer.named_parameters()}
            )

    def forward(self, ids_BT):
        x_BTD = F.embedding(ids_BT, self.tensors["embed_tokens.weight"])
        for i, layer in enumerate(self.layers):
            x_BTD = x_BTD + layer(self._norm(x_BTD, f"layers.{i}.norm.weight"))[0]
        tied = self.config["tie_word_embeddings"]
        head_VD = self.tensors["embed_tokens.weight" if tied else "lm_head.weight"]
        return self._norm(x_BTD, "norm.weight") @ head_VD.mT

    def _norm(self, x_BTD, name):
        scale = (x_BTD.square().mean(-1, keepdim=True) + self.config["norm_eps"]).rsqrt()
        return x_BTD * scale * self.tensors[name]


@pytest.fixture(params=list(CONFIGS))
def directory(request, tmp_path):
    hf = {"vocab_size": 61, "d_model": 32, **CONFIGS[request.param]}
    config = families.find(hf["model_type"]).config_from_hf(hf)
    model = new_model(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    save_model(model, tmp_path)
    return tmp_path


def ours(directory):
    model = load_model(directory)
    return SimpleNamespace(ours=lambda dtype=None: model, vocab_size=model.config.vocab_size)


def test_logits_and_gradients_equal_torchs(directory):
    theirs, model = TorchModel(directory), load_model(directory).train()
    ids = checks.token_ids(61, 2, 40)
    logits, expected = model(ids), theirs(ids)
    assert (logits - expected).abs().max() < 1e-5
    for values in (logits, expected):
        F.cross_entropy(values[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    pairs = {"embed_tokens.weight": model.embed_tokens.weight.grad, "norm.weight": model.norm.weight.grad}
    for name, gradient in pairs.items():
        assert (gradient - theirs.tensors[name].grad).norm() < 1e-4 * gradient.norm()
    last = theirs.layers[-1]
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        gradient = getattr(model.layers[-1].mixer, name).grad
        assert (gradient - getattr(last, f"{name}_l0").grad).norm() < 1e-4 * gradient.norm()


def test_cached_pieces_equal_the_whole(directory):
    checks.check_cache(ours(directory))


def test_left_padding_changes_nothing(directory):
    checks.check_left_padding(ours(directory))


def test_packed_documents_equal_separate_ones(directory):
    checks.check_packing(ours(directory))


def test_packed_documents_have_the_gradient_of_separate_ones(directory):
    ids, lengths = checks.token_ids(61, 2, 50), [7, 1, 3, 20, 19]
    documents = torch.arange(5).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    gradients = []
    for separate in (False, True):
        model = load_model(directory).train()
        logits = model(ids, documents_BT=documents)
        if separate:
            logits = torch.cat([model(part) for part in ids.split(lengths, 1)], 1)
        logits.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_greedy_text_is_the_same_in_batches(directory):
    model, theirs = load_model(directory), TorchModel(directory)
    prompts = [[5, 60, 3], [7], list(range(20)), [9] * 11]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(theirs(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert checks.our_greedy(model, prompts, 12, batch_size=1) == expected
    assert checks.our_greedy(model, prompts, 12, batch_size=4) == expected


def test_load_and_save_keep_every_bit(directory, tmp_path):
    model = load_model(directory)
    (tmp_path / "again").mkdir()
    save_model(model, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == model.config
    for (name, tensor), (other, expected) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other and torch.equal(tensor, expected)
