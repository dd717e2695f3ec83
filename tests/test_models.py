"""Our models against transformers' on small random checkpoints."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402

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
    return checks.reference(CONFIGS[request.param], tmp_path)


def test_logits(reference):
    checks.check_logits(reference, {"input_ids": checks.token_ids(97, 2, 40)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(reference, dtype):
    checks.check_half_precision(reference, {"input_ids": checks.token_ids(97, 2, 40)}, dtype)


def test_gradient(reference):
    ids = checks.token_ids(97, 2, 24)
    checks.check_gradient(reference, {"input_ids": ids}, ids, lambda model: next_token_loss(model, ids))


def test_cache_padding_and_packing(reference):
    checks.check_cache(reference)
    checks.check_left_padding(reference)
    checks.check_packing(reference)


def test_greedy(reference):
    prompts = [checks.token_ids(97, 1, n, seed=n)[0].tolist() for n in (5, 1, 11)]
    checks.check_greedy(reference, prompts, 20)


def test_save_is_identity(reference):
    checks.check_save_is_identity(reference, {"input_ids": checks.token_ids(97, 2, 40)})


def next_token_loss(model, ids):
    return torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
