"""Phi-3, Phi-3.5 and Phi-4 mini (arXiv:2404.14219): Llama with fused projections, LongRoPE and partly turned heads."""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig, Rope
from llmctl.models.families import llama_like as like
from llmctl.models.families.common import row
from llmctl.models.families.rope import rope_of

MODEL_TYPES = ("phi3",)
DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}


def config_from_hf(hf: dict) -> ModelConfig:
    hf = {**DEFAULTS, **hf}
    mixer = like.attention(hf, window=hf.get("sliding_window"), rope=_rope(hf))
    return like.model("phi3", hf, [Block(mixer, like.gated_mlp(hf), like.norm(hf))])


def _rope(hf: dict) -> Rope:
    settings = {"rope_theta": hf["rope_theta"], **(hf.get("rope_parameters") or hf.get("rope_scaling") or {})}
    kind = settings.pop("type", None) or settings.get("rope_type", "default")
    # The first releases called it "su", and a config of theirs may say "yarn".
    settings["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    return rope_of(settings, hf, hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])


def config_to_hf(config: ModelConfig) -> dict:
    mixer = config.blocks[0].mixer
    keys = like.to_hf(config, "Phi3ForCausalLM", sliding_window=mixer.window)
    return keys | _rope_scaling_to_hf(config.max_positions, mixer.rope)


def _rope_scaling_to_hf(context: int, rope: Rope) -> dict:
    """Transformers 4 takes three keys in `rope_scaling` and no other; what they imply is left out."""
    if rope.scaling is None:
        return {}
    scaling, original = rope.scaling, rope.scaling["original_max_position_embeddings"]
    implied = {"factor": context / original, "attention_factor": None}
    more = {key: scaling[key] for key, value in implied.items() if scaling.get(key) != value}
    factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
    return {
        "original_max_position_embeddings": original,
        "rope_scaling": {"type": "longrope", **factors, **more},
    }


_FFN = (
    row(
        "model.layers.{}.mlp.gate_up_proj.weight",
        "layers.{}.ffn.gate_proj.weight",
        "layers.{}.ffn.up_proj.weight",
        change="split_rows",
    ),
    row("model.layers.{}.mlp.down_proj.weight", "layers.{}.ffn.down_proj.weight"),
)
WEIGHTS = like.weights(ffn=_FFN, fused=True)
IGNORABLE = like.IGNORABLE
