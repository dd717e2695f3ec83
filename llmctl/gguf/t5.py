"""T5 in GGUF: its keys, its tensors' names, and what llama.cpp cannot be told of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmctl.models.config import GatedMlp, Mlp, ModelConfig

FLOAT32 = (".attn_rel_b.weight",)
_REACH = 128
"""The distance from which on llama.cpp puts all into one bucket."""
_USUAL_CONTEXT = 512
_STACK = {
    "blk.{}.attn_norm": "layers.{}.mixer_norm",
    "blk.{}.attn_q": "layers.{}.mixer.q_proj",
    "blk.{}.attn_k": "layers.{}.mixer.k_proj",
    "blk.{}.attn_v": "layers.{}.mixer.v_proj",
    "blk.{}.attn_o": "layers.{}.mixer.o_proj",
    "blk.0.attn_rel_b": "relative_bias",
    "blk.{}.cross_attn_norm": "layers.{}.cross_norm",
    "blk.{}.cross_attn_q": "layers.{}.cross.q_proj",
    "blk.{}.cross_attn_k": "layers.{}.cross.k_proj",
    "blk.{}.cross_attn_v": "layers.{}.cross.v_proj",
    "blk.{}.cross_attn_o": "layers.{}.cross.o_proj",
    "blk.{}.ffn_norm": "layers.{}.ffn_norm",
    "blk.{}.ffn_gate": "layers.{}.ffn.gate_proj",
    "blk.{}.ffn_up": "layers.{}.ffn.up_proj",
    "blk.{}.ffn_down": "layers.{}.ffn.down_proj",
    "output_norm": "norm",
}


def rows(config: ModelConfig) -> Iterator[tuple[str, tuple[str], str]]:
    """(the file's name, ours, what differs) of all tensors.

    The file cannot say whether a head that is the embedding is scaled, so that it always has a head, with the scale in it.
    """
    yield "token_embd.weight", ("embed_tokens.weight",), "rename"
    for theirs, ours in (("enc.", "encoder."), ("dec.", "")):
        yield from ((f"{theirs}{name}.weight", (f"{ours}{own}.weight",), "rename") for name, own in _STACK.items())
    if config.tie_embeddings or config.head.scale != 1.0:
        yield "output.weight", ("embed_tokens.weight" if config.tie_embeddings else "lm_head.weight",), "scaled"
    else:
        yield "output.weight", ("lm_head.weight",), "rename"


def obstacles(config: ModelConfig) -> Iterator[str]:
    ffn = config.blocks[0].ffn
    if ffn not in (Mlp(ffn.d_ff, "relu", bias=False), GatedMlp(ffn.d_ff, "gelu_tanh")):
        yield f"its feed-forward part is neither relu's nor gated by gelu_tanh's ({ffn.activation})"
    if {config.positions.max_distance, config.encoder.positions.max_distance} != {_REACH}:
        yield f"it tells distances up to {config.positions.max_distance} apart, not {_REACH}"
    if config.n_layers > config.encoder.n_layers:
        yield f"its decoder has more layers than its encoder ({config.n_layers} and {config.encoder.n_layers})"
    if config.classifier is not None:
        yield "it has no head that predicts tokens"


def context(config: ModelConfig) -> int:
    return config.hf.get("n_positions", _USUAL_CONTEXT)


def metadata(config: ModelConfig) -> dict[str, Any]:
    """The architecture's keys, without its name in front of them."""
    mixer = config.blocks[0].mixer
    return {
        "vocab_size": config.vocab_size,
        "context_length": context(config),
        "embedding_length": config.d_model,
        "feed_forward_length": config.blocks[0].ffn.d_ff,
        "block_count": config.encoder.n_layers,
        "decoder_block_count": config.n_layers,
        "attention.head_count": mixer.n_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
        "attention.relative_buckets_count": config.positions.n_buckets,
        "attention.layer_norm_epsilon": float(config.final_norm.eps),
        "attention.layer_norm_rms_epsilon": float(config.final_norm.eps),
        "decoder_start_token_id": config.decoder_start_id or 0,
    }


def of_keys(family: str, keys: dict[str, Any], tensors: set[str]) -> dict[str, Any]:
    """The inverse, as config.json has it."""
    return {
        "is_encoder_decoder": True,
        "decoder_start_token_id": keys.get("decoder_start_token_id", 0),
        "n_positions": keys["context_length"],
        "d_model": keys["embedding_length"],
        "d_ff": keys["feed_forward_length"],
        "d_kv": keys.get("attention.key_length") or keys["embedding_length"] // keys["attention.head_count"],
        "num_layers": keys["block_count"],
        "num_decoder_layers": keys.get("decoder_block_count", keys["block_count"]),
        "num_heads": keys["attention.head_count"],
        "relative_attention_num_buckets": keys["attention.relative_buckets_count"],
        "relative_attention_max_distance": _REACH,
        "layer_norm_epsilon": keys["attention.layer_norm_rms_epsilon"],
        "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in tensors else "relu",
        "scale_decoder_outputs": "output.weight" not in tensors,
    }
