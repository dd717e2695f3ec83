"""OLMo 2 (arXiv:2501.00656): Llama with its norms behind the branches, and on whole projections of queries and keys."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("olmo2",)
DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    norm = like.norm(hf)
    mixer = like.attention(hf, qk_norm=norm, qk_norm_over="projection")
    return like.model("olmo2", hf, [Block(mixer, like.gated_mlp(hf), norm, "output")])


def config_to_hf(config: ModelConfig) -> dict:
    return like.to_hf(config, "Olmo2ForCausalLM")


WEIGHTS = like.weights(
    norms={"post_attention_layernorm": "mixer_output_norm", "post_feedforward_layernorm": "ffn_output_norm"}
)
IGNORABLE = like.IGNORABLE
