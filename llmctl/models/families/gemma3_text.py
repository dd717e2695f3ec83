"""Gemma 3's language model (arXiv:2503.19786): five local layers to a global one, each kind with its own RoPE."""

from __future__ import annotations

from llmctl.models.config import ModelConfig, Rope
from llmctl.models.families import gemma, gemma2
from llmctl.models.families import llama_like as like
from llmctl.models.families.rope import rope_of, rope_to_hf

MODEL_TYPES = ("gemma3_text",)
DEFAULTS = {
    **gemma2.DEFAULTS,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    both = hf.get("rope_parameters") or {
        "full_attention": {"rope_theta": hf["rope_theta"], **(hf.get("rope_scaling") or {})},
        "sliding_attention": {"rope_theta": hf["rope_local_base_freq"]},
    }
    far, near = (rope_of(both[kind], hf, hf["head_dim"]) for kind in ("full_attention", "sliding_attention"))
    windows = like.windows(hf, like.every(hf["sliding_window_pattern"], hf["num_hidden_layers"]))
    norm = gemma.norm(hf)
    blocks = [gemma2.block(hf, window=window, rope=near if window else far, qk_norm=norm) for window in windows]
    # Its scaled rope was trained to the length that the config states; nothing is to be multiplied.
    return gemma2.model("gemma3_text", hf, blocks, max_positions=hf["max_position_embeddings"])


def config_to_hf(config: ModelConfig) -> dict:
    mixers = [config.block(i).mixer for i in range(config.n_layers)]
    far = next((mixer.rope for mixer in mixers if mixer.window is None), Rope(DEFAULTS["rope_theta"]))
    near = next((mixer.rope for mixer in mixers if mixer.window), Rope(DEFAULTS["rope_local_base_freq"]))
    is_far = [mixer.window is None for mixer in mixers]
    return gemma2.to_hf(
        config,
        "Gemma3ForCausalLM",
        max_position_embeddings=config.max_positions,
        sliding_window_pattern=[*is_far, True].index(True) + 1,
        **rope_to_hf(far, mixers[0].head_dim),
        rope_local_base_freq=near.theta,
    )


WEIGHTS = gemma2.WEIGHTS
IGNORABLE = like.IGNORABLE
