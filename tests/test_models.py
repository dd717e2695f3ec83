"""Our models against transformers' on small random checkpoints."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from llmctl.models.cache import Cache  # noqa: E402
from llmctl.models.config import parameter_count  # noqa: E402
from llmctl.models.loading import load_model, save_model  # noqa: E402

LLAMA = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, max_position_embeddings=64),
    "llama-bias-tied": transformers.LlamaConfig(
        **LLAMA, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=10
    ),
    "llama3-rope": transformers.LlamaConfig(**LLAMA, num_key_value_heads=1, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    ),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=3, n_head=4),
    "gpt2-untied": transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=3, n_inner=100, tie_word_embeddings=False
    ),
}


@pytest.fixture(params=list(CONFIGS))
def reference(request, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_equal_transformers(reference):
    theirs, path = reference
    ours = load_model(path / "theirs")
    ids = token_ids(2, 40)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_gradient_of_a_training_step_equals_transformers(reference):
    theirs, path = reference
    ours = load_model(path / "theirs")
    ids = token_ids(2, 24)
    theirs(ids, labels=ids).loss.backward()
    logits = ours(ids)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = theirs.get_input_embeddings().weight.grad
    error = (ours.embed_tokens.weight.grad - expected).norm() / expected.norm()
    assert error < 1e-3


def test_cached_steps_equal_one_pass(reference):
    _, path = reference
    model = load_model(path / "theirs")
    ids = token_ids(2, 30)
    cache = Cache(model.config, batch_size=2, capacity=30)
    with torch.no_grad():
        whole = model(ids)
        pieces = [model(ids[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 20), (20, 21), (21, 30))]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4


def test_left_padding_changes_nothing(reference):
    _, path = reference
    model = load_model(path / "theirs")
    ids, padding = token_ids(1, 12), 5
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], 1)
    mask = (torch.arange(12 + padding) >= padding).long()[None]
    with torch.no_grad():
        assert (model(padded, mask)[:, padding:] - model(ids)).abs().max() < 1e-4


def test_packed_documents_equal_separate_ones(reference):
    _, path = reference
    model = load_model(path / "theirs")
    ids = token_ids(1, 30)
    documents = torch.tensor([[0] * 11 + [1] * 1 + [2] * 18])
    with torch.no_grad():
        packed = model(ids, documents_BT=documents)
        alone = torch.cat([model(part) for part in ids.split([11, 1, 18], dim=1)], 1)
    assert (packed - alone).abs().max() < 1e-4


def test_save_is_identity_and_loads_in_transformers(reference):
    theirs, path = reference
    ours = load_model(path / "theirs")
    assert parameter_count(ours.config) == sum(p.numel() for p in ours.parameters())
    (path / "ours").mkdir()
    save_model(ours, path / "ours")
    back, info = type(theirs).from_pretrained(path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, tensor), (other, expected) in zip(back.state_dict().items(), theirs.state_dict().items()):
        assert name == other and torch.equal(tensor, expected)
    ids = token_ids(1, 40)
    with torch.no_grad():
        assert (back(ids).logits - theirs(ids).logits).abs().max() < 1e-5
