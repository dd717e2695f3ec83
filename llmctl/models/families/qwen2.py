"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on q, k and v, and a window in the upper layers if at all."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig
from llmctl.models.families import llama_like as like

MODEL_TYPES = ("qwen2",)
DEFAULTS = {"max_position_embeddings": 32768}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    ffn, norm = like.gated_mlp(hf), like.norm(hf)
    mixers = (like.attention(hf, qkv_bias=True, out_bias=False, window=window) for window in windows(hf))
    return like.model("qwen2", hf, [Block(mixer, ffn, norm) for mixer in mixers])


def config_to_hf(config: ModelConfig) -> dict:
    return like.to_hf(config, "Qwen2ForCausalLM", **windows_to_hf(config))


def windows(hf: dict) -> list[int | None]:
    """Of each layer: layers from `max_window_layers` on have one, if `use_sliding_window`."""
    n_layers = hf["num_hidden_layers"]
    if not hf.get("use_sliding_window"):
        return [None] * n_layers
    n_full = min(hf.get("max_window_layers", 28), n_layers)
    return like.windows(hf, ["full_attention"] * n_full + ["sliding_attention"] * (n_layers - n_full))


def windows_to_hf(config: ModelConfig) -> dict:
    """The keys of releases with `layer_types` and of those before."""
    keys = like.windows_to_hf(config)
    layer_types = [*keys["layer_types"], "sliding_attention"]
    return {
        **keys,
        "use_sliding_window": keys["sliding_window"] is not None,
        "max_window_layers": layer_types.index("sliding_attention"),
    }


WEIGHTS = like.weights()
IGNORABLE = like.IGNORABLE
