"""Mistral 7B (arXiv:2310.06825): Llama with a sliding window in every layer, where the config has one."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("mistral",)
DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    mixer = like.attention(hf, window=hf["sliding_window"])
    return like.model("mistral", hf, [Block(mixer, like.gated_mlp(hf), like.norm(hf))])


def config_to_hf(config: ModelConfig) -> dict:
    return like.to_hf(config, "MistralForCausalLM", sliding_window=config.blocks[0].mixer.window)


WEIGHTS = like.weights()
IGNORABLE = like.IGNORABLE
