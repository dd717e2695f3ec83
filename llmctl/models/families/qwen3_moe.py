"""Qwen3's mixtures of experts (arXiv:2505.09388): many small experts, in all layers or in some."""

from __future__ import annotations

from llmctl.models.config import Block, GatedMlp, ModelConfig, Moe
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("qwen3_moe",)
DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "decoder_sparse_step": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    norm = like.norm(hf)
    mixer = like.attention(hf, qk_norm=norm, window=hf.get("sliding_window") if hf.get("use_sliding_window") else None)
    experts = Moe(
        hf.get("num_experts") or hf.get("num_local_experts") or 128,
        hf["num_experts_per_tok"],
        like.gated_mlp(hf, d_ff=hf["moe_intermediate_size"]),
        normalize=hf["norm_topk_prob"],
        balance_loss=hf["router_aux_loss_coef"],
    )
    dense = like.gated_mlp(hf)
    ffns = (experts if _has_experts(hf, i) else dense for i in range(hf["num_hidden_layers"]))
    return like.model("qwen3_moe", hf, [Block(mixer, ffn, norm) for ffn in ffns])


def _has_experts(hf: dict, layer: int) -> bool:
    return layer not in (hf.get("mlp_only_layers") or ()) and (layer + 1) % hf["decoder_sparse_step"] == 0


def config_to_hf(config: ModelConfig) -> dict:
    window = config.blocks[0].mixer.window
    ffns = [config.block(i).ffn for i in range(config.n_layers)]
    experts = next(ffn for ffn in ffns if isinstance(ffn, Moe))
    dense = next((ffn for ffn in ffns if isinstance(ffn, GatedMlp)), None)
    return like.to_hf(
        config,
        "Qwen3MoeForCausalLM",
        use_sliding_window=window is not None,
        sliding_window=window,
        intermediate_size=dense.d_ff if dense else config.hf["intermediate_size"],
        moe_intermediate_size=experts.expert.d_ff,
        num_experts=experts.n_experts,
        num_local_experts=experts.n_experts,
        num_experts_per_tok=experts.top_k,
        norm_topk_prob=experts.normalize,
        router_aux_loss_coef=experts.balance_loss,
        decoder_sparse_step=1,
        mlp_only_layers=[i for i, ffn in enumerate(ffns) if not isinstance(ffn, Moe)],
    )


_NAMES = ("gate_proj", "up_proj", "down_proj")
WEIGHTS = (*like.weights(), *like.expert_weights("mlp.gate", "mlp.experts", _NAMES))
IGNORABLE = like.IGNORABLE
