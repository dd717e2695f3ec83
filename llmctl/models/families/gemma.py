"""Gemma (arXiv:2403.08295): scaled embeddings that are the head too, norms stored as the distance from 1, GeGLU."""

from __future__ import annotations

from typing import Any

from llmctl.errors import UserError
from llmctl.models.config import Block, ModelConfig, Norm
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("gemma",)
DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": 8192}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    return model("gemma", hf, [Block(like.attention(hf), gated_mlp(hf), norm(hf))])


def config_to_hf(config: ModelConfig) -> dict:
    return to_hf(config, "GemmaForCausalLM")


def norm(hf: dict) -> Norm:
    return like.norm(hf, offset=1.0)


def gated_mlp(hf: dict):
    """GELU by tanh in every release, also where an early config says "gelu"."""
    return like.gated_mlp(hf, activation="gelu_tanh")


def model(family: str, hf: dict, blocks: list[Block], **changes: Any) -> ModelConfig:
    if hf.get("use_bidirectional_attention"):
        raise UserError(f"{family} with use_bidirectional_attention is not supported", "it is an encoder in disguise")
    return like.model(family, hf, blocks, embedding_scale=hf["hidden_size"] ** 0.5, **changes)


def to_hf(config: ModelConfig, architecture: str, **more: Any) -> dict:
    activation = "gelu_pytorch_tanh"
    return like.to_hf(config, architecture, hidden_act=activation, hidden_activation=activation, **more)


WEIGHTS = like.weights()
IGNORABLE = like.IGNORABLE
