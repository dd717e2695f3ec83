"""Qwen3 (arXiv:2505.09388): Qwen2 with RMSNorm on each head's queries and keys in place of the biases."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig
from llmctl.models.families import llama_like as like
from llmctl.models.families.qwen2 import windows, windows_to_hf

MODEL_TYPES = ("qwen3",)
DEFAULTS = {"head_dim": 128, "max_position_embeddings": 32768}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    ffn, norm = like.gated_mlp(hf), like.norm(hf)
    mixers = (like.attention(hf, qk_norm=norm, window=window) for window in windows(hf))
    return like.model("qwen3", hf, [Block(mixer, ffn, norm) for mixer in mixers])


def config_to_hf(config: ModelConfig) -> dict:
    return like.to_hf(config, "Qwen3ForCausalLM", **windows_to_hf(config))


WEIGHTS = like.weights()
IGNORABLE = like.IGNORABLE
