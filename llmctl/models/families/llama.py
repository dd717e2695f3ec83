"""Llama 1, 2, 3 (arXiv:2302.13971, 2407.21783): RMSNorm, rotary positions, SwiGLU, grouped heads."""

from __future__ import annotations

from llmctl.models.config import Attention, Block, GatedMlp, ModelConfig, Norm
from llmctl.models.families.common import ACTIVATIONS, HF_ACTIVATIONS, rope_from_hf, rope_to_hf, row

MODEL_TYPES = ("llama",)


def config_from_hf(hf: dict) -> ModelConfig:
    d_model, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    norm = Norm("rms", hf.get("rms_norm_eps", 1e-6))
    bias = hf.get("attention_bias", False)
    block = Block(
        mixer=Attention(
            n_heads=n_heads,
            n_kv_heads=hf.get("num_key_value_heads") or n_heads,
            head_dim=hf.get("head_dim") or d_model // n_heads,
            rope=rope_from_hf(hf),
            qkv_bias=bias,
            out_bias=bias,
        ),
        ffn=GatedMlp(hf["intermediate_size"], ACTIVATIONS[hf.get("hidden_act", "silu")], hf.get("mlp_bias", False)),
        norm=norm,
    )
    return ModelConfig(
        family="llama",
        vocab_size=hf["vocab_size"],
        d_model=d_model,
        n_layers=hf["num_hidden_layers"],
        max_positions=hf.get("max_position_embeddings", 2048),
        blocks=(block,),
        final_norm=norm,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        initializer_range=hf.get("initializer_range", 0.02),
        hf=hf,
    )


def config_to_hf(config: ModelConfig) -> dict:
    mixer, ffn = config.blocks[0].mixer, config.blocks[0].ffn
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.final_norm.eps,
        "attention_bias": mixer.qkv_bias,
        "mlp_bias": ffn.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        **rope_to_hf(mixer.rope),
    }


WEIGHTS = (
    row("model.embed_tokens.weight", "embed_tokens.weight"),
    *(
        row(f"model.layers.{{}}.self_attn.{name}.{kind}", f"layers.{{}}.mixer.{name}.{kind}")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        for kind in ("weight", "bias")
    ),
    *(
        row(f"model.layers.{{}}.mlp.{name}.{kind}", f"layers.{{}}.ffn.{name}.{kind}")
        for name in ("gate_proj", "up_proj", "down_proj")
        for kind in ("weight", "bias")
    ),
    row("model.layers.{}.input_layernorm.weight", "layers.{}.mixer_norm.weight"),
    row("model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight"),
    row("model.norm.weight", "norm.weight"),
    row("lm_head.weight", "lm_head.weight"),
)
IGNORABLE = (r"rotary_emb\.inv_freq$",)
