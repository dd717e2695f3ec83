"""The decoder-only families against transformers: see family_checks for what is compared."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import family_checks as checks  # noqa: E402

from llmctl.generation.session import Session  # noqa: E402
from llmctl.generation.settings import Sampling  # noqa: E402
from llmctl.inspection import inspect  # noqa: E402
from llmctl.models.ffn import balance_loss  # noqa: E402
from llmctl.pretrain.settings import PretrainSettings  # noqa: E402
from llmctl.pretrain.task import pretraining  # noqa: E402

V = 97
CONTEXT = 40
SHAPE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def shape(**changes) -> dict:
    return {**SHAPE, **changes}


def rope(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **settings}}


ORIGINAL = 16
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
)
YARN = rope("yarn", factor=2.5, original_max_position_embeddings=ORIGINAL)
YARN_TUNED = rope(
    "yarn",
    factor=2.5,
    original_max_position_embeddings=ORIGINAL,
    beta_fast=4.0,
    beta_slow=0.5,
    mscale=0.7,
    mscale_all_dim=1.3,
    truncate=False,
)


def longrope(pairs: int, **more) -> dict:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return rope("longrope", **factors, **more)


LLAMA, QWEN2, QWEN3 = transformers.LlamaConfig, transformers.Qwen2Config, transformers.Qwen3Config
GEMMA2, GEMMA3, PHI3 = transformers.Gemma2Config, transformers.Gemma3TextConfig, transformers.Phi3Config
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
FIRST = {
    "llama": LLAMA(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=6),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2),
    "qwen2": QWEN2(**SHAPE),
    "qwen3": QWEN3(**SHAPE, head_dim=10),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=10, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20
    ),
    "gemma": transformers.GemmaConfig(**SHAPE, head_dim=10),
    "gemma2": GEMMA2(**SHAPE, head_dim=10, sliding_window=6, query_pre_attn_scalar=24),
    "gemma3_text": GEMMA3(**SHAPE, head_dim=10, sliding_window=6, layer_types=MIXED, query_pre_attn_scalar=24),
    "phi3": PHI3(**SHAPE),
    "smollm3": transformers.SmolLM3Config(**shape(num_hidden_layers=5)),
    "olmo2": transformers.Olmo2Config(**SHAPE),
    "gpt2": transformers.GPT2Config(vocab_size=V, n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=4),
}
MORE = {
    "llama-bias-tied": LLAMA(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=6),
    "llama-one-kv-head": LLAMA(**shape(num_key_value_heads=1), rms_norm_eps=1e-3, hidden_act="gelu"),
    "llama-linear": LLAMA(**SHAPE, **rope("linear", factor=4.0)),
    "llama-dynamic": LLAMA(**shape(max_position_embeddings=ORIGINAL), **rope("dynamic", factor=2.5)),
    "llama-yarn": LLAMA(**SHAPE, **YARN),
    "llama-yarn-tuned": LLAMA(**SHAPE, **YARN_TUNED),
    "llama-llama3": LLAMA(**SHAPE, **LLAMA3),
    "mistral-no-window": transformers.MistralConfig(**SHAPE, sliding_window=None, head_dim=14),
    "mistral-window-of-two": transformers.MistralConfig(**SHAPE, sliding_window=2),
    "mixtral-window-tied": transformers.MixtralConfig(
        **SHAPE, sliding_window=7, num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=True
    ),
    "qwen2-windows": QWEN2(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-tied-yarn": QWEN2(**SHAPE, tie_word_embeddings=True, **YARN),
    "qwen3-windows": QWEN3(
        **SHAPE, head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen3_moe-mixed": transformers.Qwen3MoeConfig(
        **shape(num_hidden_layers=4),
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=9,
    ),
    "gemma-untied-bias": transformers.GemmaConfig(**SHAPE, head_dim=12, tie_word_embeddings=False, attention_bias=True),
    "gemma2-no-caps": GEMMA2(
        **SHAPE, head_dim=8, sliding_window=3, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "gemma3_text-linear": GEMMA3(
        **shape(num_hidden_layers=7),
        head_dim=8,
        sliding_window=5,
        final_logit_softcapping=20.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "phi3-window-partial": PHI3(**SHAPE, sliding_window=6, **rope("default", partial_rotary_factor=0.75)),
    "phi3-longrope": PHI3(**SHAPE, original_max_position_embeddings=ORIGINAL, **longrope(4)),
    "phi3-longrope-partial": PHI3(
        **shape(hidden_size=36),
        original_max_position_embeddings=ORIGINAL,
        tie_word_embeddings=True,
        **longrope(2, partial_rotary_factor=0.5, attention_factor=1.3),
    ),
    "smollm3-windows": transformers.SmolLM3Config(
        **SHAPE,
        no_rope_layers=[0, 1, 0],
        use_sliding_window=True,
        sliding_window=5,
        tie_word_embeddings=False,
        attention_bias=True,
    ),
    "olmo2-bias-tied-yarn": transformers.Olmo2Config(**SHAPE, attention_bias=True, tie_word_embeddings=True, **YARN),
    "gpt2-scaled-by-layer": transformers.GPT2Config(
        vocab_size=V, n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2-unscaled": transformers.GPT2Config(
        vocab_size=V, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, scale_attn_weights=False
    ),
    "gpt2-untied": transformers.GPT2Config(
        vocab_size=V, n_positions=CONTEXT, n_embd=36, n_layer=2, n_head=3, n_inner=50, tie_word_embeddings=False
    ),
}
CONFIGS = FIRST | MORE


@pytest.fixture(params=list(CONFIGS))
def reference(request, tmp_path):
    return checks.reference(CONFIGS[request.param], tmp_path)


def ids(batch: int, length: int) -> torch.Tensor:
    return checks.token_ids(V, batch, length)


def longest_single_pass(reference) -> int:
    """Up to here a text read in pieces has the angles of one read whole."""
    settings = getattr(reference.model.config, "rope_parameters", None) or {}
    return ORIGINAL if settings.get("rope_type") in ("dynamic", "longrope") else 30


def test_logits(reference):
    checks.check_logits(reference, {"input_ids": ids(2, CONTEXT)})


def test_gradient(reference):
    text = ids(2, 24)
    inputs = {"input_ids": text}
    if hasattr(reference.model.config, "router_aux_loss_coef"):
        reference.model.router_aux_loss_coef = 0.3
        inputs["output_router_logits"] = True

    def loss(model):
        entropy = torch.nn.functional.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        balance = balance_loss(model)
        return entropy if balance is None else entropy + balance * 0.3 / 0.001

    checks.check_gradient(reference, inputs, text, loss)


def test_cache_padding_and_packing(reference):
    checks.check_cache(reference, longest_single_pass(reference))
    checks.check_left_padding(reference)
    checks.check_packing(reference)


def test_greedy(reference):
    prompts = [checks.token_ids(V, 1, n, seed=n)[0].tolist() for n in (5, 1, 11)]
    checks.check_greedy(reference, prompts, CONTEXT - 10)


def test_save_is_identity(reference):
    checks.check_save_is_identity(reference, {"input_ids": ids(2, CONTEXT)})


@pytest.mark.parametrize("name", list(FIRST))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype, tmp_path):
    checks.check_half_precision(checks.reference(CONFIGS[name], tmp_path), {"input_ids": ids(2, 30)}, dtype)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, write_tokens, some_texts):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "corpus.arrow", some_texts)


@pytest.mark.parametrize("name", list(FIRST))
def test_what_we_train_scores_the_same_in_transformers(name, tmp_path, tokens):
    """From its config.json, then further from its own weights; the result continues a text and is described."""
    config = copy.deepcopy(FIRST[name])
    config.vocab_size = 257
    config.save_pretrained(tmp_path)
    train(tmp_path / "first", tokens, model_config=str(tmp_path / "config.json"))
    train(tmp_path / "second", tokens, init_from=str(tmp_path / "first"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    session = Session.open(tmp_path / "second", device="cpu")
    text = checks.token_ids(257, 2, 30)
    with torch.no_grad():
        expected = theirs(text, labels=text).loss
        found = torch.nn.functional.cross_entropy(session.model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert abs(found - expected) < 1e-4
    greedy = Sampling(max_new_tokens=4, temperature=0.0, seed=0, ignore_eos=True)
    completion = session.begin("the cat", greedy)
    assert "".join(session.stream(completion)) == completion.text and len(completion.ids) == 4
    record = next(inspect(tmp_path / "second"))
    assert record["parameters"] == theirs.num_parameters() and "Attention(" in " ".join(record["layers"].values())


def train(output, tokens, **shape):
    usual = {"seq_len": 32, "batch_size": 2, "steps": 2, "precision": "fp32", "warmup_steps": 1, "validate_every": 100}
    with pretraining(PretrainSettings(**usual | shape), [str(tokens)], output, frozenset()) as run:
        for _ in run.run():
            pass
