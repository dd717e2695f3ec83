"""Gemma 2 (arXiv:2408.00118): local and global layers in turn, norms on both sides of a branch, soft-capped logits."""

from __future__ import annotations

from typing import Any

from llmctl.models.config import Block, Head, ModelConfig
from llmctl.models.families import gemma
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("gemma2",)
DEFAULTS = {
    **gemma.DEFAULTS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    windows = like.windows(hf, like.every(2, hf["num_hidden_layers"]))
    return model("gemma2", hf, [block(hf, window=window) for window in windows])


def config_to_hf(config: ModelConfig) -> dict:
    return to_hf(config, "Gemma2ForCausalLM")


def block(hf: dict, **changes: Any) -> Block:
    scale, softcap = hf["query_pre_attn_scalar"] ** -0.5, hf["attn_logit_softcapping"]
    mixer = like.attention(hf, scale=scale, softcap=softcap, **changes)
    return Block(mixer, gemma.gated_mlp(hf), gemma.norm(hf), "sandwich")


def model(family: str, hf: dict, blocks: list[Block], **changes: Any) -> ModelConfig:
    return gemma.model(family, hf, blocks, head=Head(softcap=hf["final_logit_softcapping"]), **changes)


def to_hf(config: ModelConfig, architecture: str, **more: Any) -> dict:
    mixer = config.blocks[0].mixer
    return gemma.to_hf(
        config,
        architecture,
        query_pre_attn_scalar=round(mixer.scale**-2),
        attn_logit_softcapping=mixer.softcap,
        final_logit_softcapping=config.head.softcap,
        **like.windows_to_hf(config),
        **more,
    )


WEIGHTS = like.weights(
    norms={
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "mixer_output_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "ffn_output_norm",
    }
)
IGNORABLE = like.IGNORABLE
