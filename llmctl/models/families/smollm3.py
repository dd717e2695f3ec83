"""SmolLM3 (Hugging Face, 2025): Llama in which every fourth layer has no positions (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("smollm3",)
DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    ffn, norm, usual = like.gated_mlp(hf), like.norm(hf), like.attention(hf)
    ropes = [usual.rope if turns else None for turns in _turning_layers(hf)]
    windows = [None] * len(ropes)
    if hf.get("use_sliding_window"):
        windows = like.windows(hf, ["full_attention" if rope else "sliding_attention" for rope in ropes])
    mixers = (like.attention(hf, rope=rope, window=window) for rope, window in zip(ropes, windows))
    return like.model("smollm3", hf, [Block(mixer, ffn, norm) for mixer in mixers])


def _turning_layers(hf: dict) -> list[bool]:
    """`no_rope_layers`, despite its name, has a 1 for each layer with RoPE."""
    every = hf["no_rope_layer_interval"]
    given = hf.get("no_rope_layers") or [(i + 1) % every for i in range(hf["num_hidden_layers"])]
    return [bool(turns) for turns in given[: hf["num_hidden_layers"]]]


def config_to_hf(config: ModelConfig) -> dict:
    windows = like.windows_to_hf(config)
    return like.to_hf(
        config,
        "SmolLM3ForCausalLM",
        no_rope_layers=[int(config.block(i).mixer.rope is not None) for i in range(config.n_layers)],
        use_sliding_window=windows["sliding_window"] is not None,
        **windows,
    )


WEIGHTS = like.weights()
IGNORABLE = like.IGNORABLE
