"""Mamba and Mamba-2 in GGUF: their keys, their tensors' names, and what llama.cpp cannot be told of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from llmctl.models.config import ModelConfig
from llmctl.models.config_recurrent import Mamba, Mamba2

CONTEXT = 1 << 20
"""What is stated of models that know no positions: as much as llama.cpp's own converter says."""
FLOAT32 = (".ssm_conv1d.weight", ".ssm_a", ".ssm_d", ".ssm_norm.weight")
"""Ends of the names of tensors whose type llama.cpp lets no one choose."""
_MIXER = "layers.{}.mixer"
_AROUND = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "layers.{}.mixer_norm",
}
_BOTH = {
    "blk.{}.ssm_in.weight": ("in_proj.weight", "rename"),
    "blk.{}.ssm_conv1d.weight": ("conv1d.weight", "taps"),
    "blk.{}.ssm_conv1d.bias": ("conv1d.bias", "rename"),
    "blk.{}.ssm_out.weight": ("out_proj.weight", "rename"),
}
_PARTICULAR = {
    Mamba: {
        "blk.{}.ssm_x.weight": ("x_proj.weight", "rename"),
        "blk.{}.ssm_dt.weight": ("dt_proj.weight", "rename"),
        "blk.{}.ssm_dt.bias": ("dt_proj.bias", "rename"),
        "blk.{}.ssm_a": ("A_log", "decay"),
        "blk.{}.ssm_d": ("D", "rename"),
    },
    Mamba2: {
        "blk.{}.ssm_dt.bias": ("dt_bias", "rename"),
        "blk.{}.ssm_a": ("A_log", "decay column"),
        "blk.{}.ssm_d": ("D", "column"),
        "blk.{}.ssm_norm.weight": ("norm.weight", "groups"),
    },
}


def rows(config: ModelConfig) -> Iterator[tuple[str, tuple[str], str]]:
    """(the file's name, ours, what differs) of all tensors."""
    yield from ((f"{theirs}.weight", (f"{ours}.weight",), "rename") for theirs, ours in _AROUND.items())
    mixer = config.blocks[0].mixer
    for theirs, (ours, change) in (_BOTH | _PARTICULAR[type(mixer)]).items():
        yield theirs, (f"{_MIXER}.{ours}",), change


def obstacles(config: ModelConfig) -> Iterator[str]:
    mixer = config.blocks[0].mixer
    if config.classifier is not None or config.head is None:
        yield "it has no head that predicts tokens"
    if mixer.bias:
        yield "each layer has biases in its projections"
    if not mixer.conv_bias:
        yield "each layer has no bias in its convolution"
    if mixer.activation != "silu":
        yield f"each layer has the activation {mixer.activation}, not silu"
    if isinstance(mixer, Mamba) and mixer.d_inner != 2 * config.d_model:
        yield f"each layer is {mixer.d_inner} wide inside, not twice {config.d_model}"
    if isinstance(mixer, Mamba2) and tuple(mixer.dt_limit) != (0.0, math.inf):
        yield "each layer limits its step sizes"


def context(config: ModelConfig) -> int:
    return CONTEXT


def metadata(config: ModelConfig) -> dict[str, Any]:
    """The architecture's keys, without its name in front of them."""
    mixer = config.blocks[0].mixer
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": CONTEXT,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": float(config.final_norm.eps),
        "ssm.conv_kernel": mixer.conv_width,
        "ssm.inner_size": mixer.d_inner,
        "ssm.state_size": mixer.d_state,
    }
    if isinstance(mixer, Mamba):
        return {**keys, "ssm.time_step_rank": mixer.dt_rank}
    return {**keys, "ssm.time_step_rank": mixer.n_heads, "ssm.group_count": mixer.n_groups}


def of_keys(family: str, keys: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    """The inverse, as config.json has it."""
    width, inner, rank = keys["embedding_length"], keys["ssm.inner_size"], keys["ssm.time_step_rank"]
    hf = {
        "hidden_size": width,
        "num_hidden_layers": keys["block_count"],
        "expand": inner // width if inner % width == 0 else inner / width,
        "state_size": keys["ssm.state_size"],
        "conv_kernel": keys["ssm.conv_kernel"],
        "layer_norm_epsilon": keys["attention.layer_norm_rms_epsilon"],
    }
    if family == "mamba":
        return {**hf, "intermediate_size": inner, "time_step_rank": rank}
    return {**hf, "num_heads": rank, "head_dim": inner // rank, "n_groups": keys["ssm.group_count"]}
