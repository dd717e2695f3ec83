"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases everywhere, tied head."""

from __future__ import annotations

from llmctl.models.config import Attention, Block, LearnedPositions, Mlp, ModelConfig, Norm
from llmctl.models.families.common import ACTIVATIONS, HF_ACTIVATIONS, SCORE, row, shortest, usual_heads

MODEL_TYPES = ("gpt2",)


def config_from_hf(hf: dict) -> ModelConfig:
    d_model, n_heads = hf["n_embd"], hf["n_head"]
    norm = Norm("layer", hf.get("layer_norm_epsilon", 1e-5))
    activation = ACTIVATIONS[hf.get("activation_function", "gelu_new")]
    ffn = Mlp(hf.get("n_inner") or 4 * d_model, activation)
    mixers = (
        Attention(n_heads, n_heads, d_model // n_heads, qkv_bias=True, out_bias=True, scale=scale)
        for scale in _scales(hf, d_model // n_heads)
    )
    return ModelConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        n_layers=hf["n_layer"],
        max_positions=hf.get("n_positions", 1024),
        blocks=shortest([Block(mixer, ffn, norm) for mixer in mixers]),
        positions=LearnedPositions(),
        final_norm=norm,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        initializer_range=hf.get("initializer_range", 0.02),
        hf=hf,
    )


def _scales(hf: dict, head_dim: int) -> list[float | None]:
    """Of each layer's scores; two keys, seldom used, change it."""
    scale = None if hf.get("scale_attn_weights", True) else 1.0
    if not hf.get("scale_attn_by_inverse_layer_idx"):
        return [scale] * hf["n_layer"]
    return [(scale or head_dim**-0.5) / (layer + 1) for layer in range(hf["n_layer"])]


def config_to_hf(config: ModelConfig) -> dict:
    mixer, ffn = config.blocks[0].mixer, config.blocks[0].ffn
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": mixer.n_heads,
        "n_inner": ffn.d_ff,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "activation_function": HF_ACTIVATIONS[ffn.activation],
        "layer_norm_epsilon": config.final_norm.eps,
        "scale_attn_weights": mixer.scale != 1.0,
        "scale_attn_by_inverse_layer_idx": len(config.blocks) > 1,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    return {"n_embd": width, "n_layer": depth, "n_head": usual_heads(width), "n_positions": context}


_KINDS = ("weight", "bias")
_QKV = ("q_proj", "k_proj", "v_proj")

WEIGHTS = (
    row("transformer.wte.weight", "embed_tokens.weight"),
    row("transformer.wpe.weight", "embed_positions.weight"),
    *(row(f"transformer.h.{{}}.ln_1.{k}", f"layers.{{}}.mixer_norm.{k}") for k in _KINDS),
    *(
        row(
            f"transformer.h.{{}}.attn.c_attn.{k}", *(f"layers.{{}}.mixer.{n}.{k}" for n in _QKV), change="split_columns"
        )
        for k in _KINDS
    ),
    *(
        row(f"transformer.h.{{}}.attn.c_proj.{k}", f"layers.{{}}.mixer.o_proj.{k}", change="split_columns")
        for k in _KINDS
    ),
    *(row(f"transformer.h.{{}}.ln_2.{k}", f"layers.{{}}.ffn_norm.{k}") for k in _KINDS),
    *(row(f"transformer.h.{{}}.mlp.c_fc.{k}", f"layers.{{}}.ffn.up_proj.{k}", change="split_columns") for k in _KINDS),
    *(
        row(f"transformer.h.{{}}.mlp.c_proj.{k}", f"layers.{{}}.ffn.down_proj.{k}", change="split_columns")
        for k in _KINDS
    ),
    *(row(f"transformer.ln_f.{k}", f"norm.{k}") for k in _KINDS),
    row("lm_head.weight", "lm_head.weight"),
    SCORE,
)
IGNORABLE = (r"attn\.(masked_)?bias$",)
