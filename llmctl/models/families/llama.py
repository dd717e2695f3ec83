"""Llama 1, 2, 3 (arXiv:2302.13971, 2407.21783): RMSNorm, rotary positions, SwiGLU, grouped heads."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig
from llmctl.models.families import llama_like as like
from llmctl.models.families.common import usual_heads

MODEL_TYPES = ("llama",)
DEFAULTS = {"max_position_embeddings": 2048}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    return like.model("llama", hf, [Block(like.attention(hf), like.gated_mlp(hf), like.norm(hf))])


def config_to_hf(config: ModelConfig) -> dict:
    return like.to_hf(config, "LlamaForCausalLM")


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    heads = usual_heads(width)
    return {
        "hidden_size": width,
        "intermediate_size": -(-8 * width // 3 // 32) * 32,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 if width >= 1024 and heads % 4 == 0 else heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": width < 2048,
    }


WEIGHTS = like.weights()
IGNORABLE = like.IGNORABLE
