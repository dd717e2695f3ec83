"""Llama 1, 2, 3 (arXiv:2302.13971, 2407.21783): RMSNorm, rotary positions, SwiGLU, grouped heads."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("llama",)
DEFAULTS = {"max_position_embeddings": 2048}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    return like.model("llama", hf, [Block(like.attention(hf), like.gated_mlp(hf), like.norm(hf))])


def config_to_hf(config: ModelConfig) -> dict:
    return like.to_hf(config, "LlamaForCausalLM")


WEIGHTS = like.weights()
IGNORABLE = like.IGNORABLE
