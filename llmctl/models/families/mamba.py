"""Mamba (arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060): state spaces, RMSNorm, no feed-forward layers."""

from __future__ import annotations

import math

from llmctl.models.config import Block, ModelConfig, Norm
from llmctl.models.config_recurrent import Mamba, Mamba2
from llmctl.models.families.common import ACTIVATIONS, HF_ACTIVATIONS, SCORE, row

MODEL_TYPES = ("mamba", "mamba2")


def config_from_hf(hf: dict) -> ModelConfig:
    float32_residual = hf.get("residual_in_fp32", True)
    norm = Norm("rms", hf.get("layer_norm_epsilon", 1e-5), casts=float32_residual)
    is_first = hf["model_type"] == "mamba"
    return ModelConfig(
        family=hf["model_type"],
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        max_positions=None,
        blocks=(Block(_mamba(hf) if is_first else _mamba2(hf, norm), None, norm),),
        final_norm=norm,
        float32_residual=float32_residual,
        tie_embeddings=hf.get("tie_word_embeddings", is_first),
        initializer_range=hf.get("initializer_range", 0.1),
        hf=hf,
    )


def config_to_hf(config: ModelConfig) -> dict:
    mixer = config.blocks[0].mixer
    particular = _mamba_to_hf(mixer) if config.family == "mamba" else _mamba2_to_hf(mixer)
    return {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "layer_norm_epsilon": config.final_norm.eps,
        "expand": _expansion(mixer.d_inner, config.d_model),
        "state_size": mixer.d_state,
        "conv_kernel": mixer.conv_width,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": HF_ACTIVATIONS[mixer.activation],
        "time_step_min": mixer.dt_range[0],
        "time_step_max": mixer.dt_range[1],
        "time_step_floor": mixer.dt_floor,
        "residual_in_fp32": config.float32_residual,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        **particular,
    }


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    """Two layers in place of a transformer's one, whose weights they match (arXiv:2312.00752, 3.4)."""
    shape = {
        "hidden_size": width,
        "num_hidden_layers": 2 * depth,
        "initializer_range": 0.02,
        "tie_word_embeddings": width < 2048,
    }
    if model_type == "mamba":
        return {**shape, "state_size": 16}
    head_dim = 64 if width >= 512 else 32
    state_size = 128 if width >= 512 else 64
    return {**shape, "state_size": state_size, "head_dim": head_dim, "num_heads": 2 * width // head_dim, "n_groups": 1}


def _mamba(hf: dict) -> Mamba:
    rank = hf.get("time_step_rank", "auto")
    return Mamba(
        d_inner=int(hf.get("expand", 2) * hf["hidden_size"]),
        d_state=hf.get("state_size", 16),
        dt_rank=math.ceil(hf["hidden_size"] / 16) if rank == "auto" else rank,
        **_both(hf),
    )


def _mamba_to_hf(mixer: Mamba) -> dict:
    return {"time_step_rank": mixer.dt_rank, "intermediate_size": mixer.d_inner}


def _mamba2(hf: dict, norm: Norm) -> Mamba2:
    return Mamba2(
        n_heads=hf.get("num_heads", 128),
        head_dim=hf.get("head_dim", 64),
        d_state=hf.get("state_size", 128),
        n_groups=hf.get("n_groups", 8),
        norm_eps=norm.eps,
        dt_limit=tuple(map(_number, hf.get("time_step_limit", (0.0, math.inf)))),
        **_both(hf),
    )


def _mamba2_to_hf(mixer: Mamba2) -> dict:
    hf = {"num_heads": mixer.n_heads, "head_dim": mixer.head_dim, "n_groups": mixer.n_groups}
    if math.isfinite(mixer.dt_limit[1]):  # JSON has no infinity; without the key it is the default
        hf["time_step_limit"] = list(mixer.dt_limit)
    return hf


def _both(hf: dict) -> dict:
    return {
        "conv_width": hf.get("conv_kernel", 4),
        "bias": hf.get("use_bias", False),
        "conv_bias": hf.get("use_conv_bias", True),
        "activation": ACTIVATIONS[hf.get("hidden_act", "silu")],
        "dt_range": (hf.get("time_step_min", 1e-3), hf.get("time_step_max", 0.1)),
        "dt_floor": hf.get("time_step_floor", 1e-4),
    }


def _expansion(d_inner: int, d_model: int) -> float:
    return d_inner / d_model if d_inner % d_model else d_inner // d_model


def _number(value) -> float:
    """transformers 5 writes an infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


_PARTS = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight")
_PARTS += ("dt_proj.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight", "out_proj.bias")

WEIGHTS = (
    row("backbone.embeddings.weight", "embed_tokens.weight"),
    row("backbone.layers.{}.norm.weight", "layers.{}.mixer_norm.weight"),
    *(row(f"backbone.layers.{{}}.mixer.{part}", f"layers.{{}}.mixer.{part}") for part in _PARTS),
    row("backbone.norm_f.weight", "norm.weight"),
    row("lm_head.weight", "lm_head.weight"),
    SCORE,
)
IGNORABLE = ()
SPELLINGS = ((r"^backbone\.embedding\.", "backbone.embeddings."),)
"""The tensor's name in the files that the papers' authors published."""
