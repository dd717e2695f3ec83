"""Models that carry a state along the text: Mamba and Mamba-2 against transformers, LSTM and GRU against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402

MAMBA = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, state_size=8)
MAMBA2 = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, state_size=8, num_heads=6, head_dim=16, n_groups=2)
CONFIGS = {
    "mamba": transformers.MambaConfig(**MAMBA),
    "mamba-untied-bias": transformers.MambaConfig(
        **MAMBA, tie_word_embeddings=False, use_bias=True, use_conv_bias=False, conv_kernel=3, time_step_rank=5
    ),
    "mamba-wide": transformers.MambaConfig(
        **{**MAMBA, "state_size": 5}, expand=3, hidden_act="gelu", residual_in_fp32=False, layer_norm_epsilon=1e-3
    ),
    "mamba2": transformers.Mamba2Config(**MAMBA2),
    "mamba2-tied-bias": transformers.Mamba2Config(
        **{**MAMBA2, "n_groups": 1}, tie_word_embeddings=True, use_bias=True, conv_kernel=2, chunk_size=16
    ),
    "mamba2-groups": transformers.Mamba2Config(
        **{**MAMBA2, "n_groups": 6, "num_heads": 12, "head_dim": 4},
        expand=1,
        use_conv_bias=False,
        residual_in_fp32=False,
    ),
}
# A limit that binds: transformers heeds it over whole texts only, not in single steps.
LIMITED = transformers.Mamba2Config(**MAMBA2, time_step_limit=(0.3, 0.9))


@pytest.fixture(params=list(CONFIGS))
def reference(request, tmp_path):
    return checks.reference(CONFIGS[request.param], tmp_path)


def inputs(length: int = 100) -> dict[str, torch.Tensor]:
    return {"input_ids": checks.token_ids(97, 2, length)}


def test_logits_equal_transformers(reference):
    checks.check_logits(reference, inputs())


def test_logits_with_limited_step_sizes(tmp_path):
    reference = checks.reference(LIMITED, tmp_path)
    checks.check_logits(reference, inputs())
    checks.check_cache(reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_transformers(reference, dtype):
    checks.check_half_precision(reference, inputs(40), dtype)


def test_gradient_of_a_training_step_equals_transformers(reference):
    ids = inputs(70)["input_ids"]

    def our_loss(model):
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    checks.check_gradient(reference, {"input_ids": ids}, ids, our_loss)


def test_save_is_identity_and_loads_in_transformers(reference):
    checks.check_save_is_identity(reference, inputs(40))


def test_cached_pieces_equal_the_whole(reference):
    checks.check_cache(reference)


def test_left_padding_changes_nothing(reference):
    checks.check_left_padding(reference)


def test_packed_documents_equal_separate_ones(reference):
    checks.check_packing(reference)


def test_greedy_text_equals_transformers(reference):
    prompts = [[5, 80, 3], [7], list(range(20)), [9] * 11]
    checks.check_greedy(reference, prompts, new_tokens=20)
