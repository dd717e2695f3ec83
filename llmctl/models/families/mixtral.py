"""Mixtral 8x7B (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig, Moe
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("mixtral",)
DEFAULTS = {
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    mixer = like.attention(hf, window=hf.get("sliding_window"))
    experts = Moe(
        hf["num_local_experts"],
        hf["num_experts_per_tok"],
        like.gated_mlp(hf),
        balance_loss=hf["router_aux_loss_coef"],
    )
    return like.model("mixtral", hf, [Block(mixer, experts, like.norm(hf))])


def config_to_hf(config: ModelConfig) -> dict:
    mixer, experts = config.blocks[0].mixer, config.blocks[0].ffn
    return like.to_hf(
        config,
        "MixtralForCausalLM",
        sliding_window=mixer.window,
        num_local_experts=experts.n_experts,
        num_experts_per_tok=experts.top_k,
        router_aux_loss_coef=experts.balance_loss,
    )


WEIGHTS = like.weights(ffn=like.expert_weights("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2")))
IGNORABLE = like.IGNORABLE
