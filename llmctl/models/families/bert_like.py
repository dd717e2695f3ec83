"""What the encoders that descend from BERT share: the keys of their configs and the names of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.models.config import (
    Attention,
    Block,
    Carried,
    Classifier,
    Head,
    HeadTransform,
    LearnedPositions,
    LocalAttention,
    Mlp,
    ModelConfig,
    Norm,
)
from llmctl.models.families.common import ACTIVATIONS, HF_ACTIVATIONS, Row, row, usual_heads

IGNORABLE = (
    r"(^|\.)pooler\.",
    r"^classifier\.",
    r"^cls\.seq_relationship\.",
    r"\.position_ids$",
    r"^(cls\.predictions|lm_head)\.decoder\.(weight|bias)$",
)
"""Heads for other tasks, buffers, and second names of tied tensors."""
SPELLINGS = ((r"\.LayerNorm\.gamma$", ".LayerNorm.weight"), (r"\.LayerNorm\.beta$", ".LayerNorm.bias"))
CLASSIFIER = Classifier(at="first", dense=True, bias=True)
_KINDS = ("weight", "bias")
_SPARE_BIAS = "spare_head_bias"


def norm(hf: dict) -> Norm:
    return Norm("layer", hf.get("layer_norm_eps", 1e-12))


def attention(hf: dict, **changes: Any) -> Attention:
    n_heads = hf["num_attention_heads"]
    usual = {"qkv_bias": True, "out_bias": True, "causal": False}
    return Attention(n_heads, n_heads, hf["hidden_size"] // n_heads, **{**usual, **changes})


def model(
    hf: dict, mixers: Sequence[Attention | LocalAttention], positions: LearnedPositions | None, **changes: Any
) -> ModelConfig:
    """Norms behind each branch and behind the embeddings; `mixers` of each layer, or one for all."""
    norm_, activation = norm(hf), ACTIVATIONS[hf.get("hidden_act", "gelu")]
    tied = hf.get("tie_word_embeddings", True)
    usual = {
        "blocks": tuple(Block(mixer, Mlp(hf["intermediate_size"], activation), norm_, "post") for mixer in mixers),
        "final_norm": None,
        "embedding_norm": norm_,
        "token_types": hf.get("type_vocab_size", 2),
        "head": Head(HeadTransform(activation, norm_), bias=True),
        # An untied head has the bias of its own Linear, and the file that of the tied one, which nothing reads.
        "carried": () if tied else (Carried(_SPARE_BIAS, (hf["vocab_size"],), of_head=True),),
    }
    return ModelConfig(
        family=hf["model_type"],
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        max_positions=hf.get("max_position_embeddings", 512) - (positions.offset if positions else 0),
        positions=positions,
        tie_embeddings=tied,
        initializer_range=hf.get("initializer_range", 0.02),
        hf=hf,
        **{**usual, **changes},
    )


def to_hf(config: ModelConfig, architecture: str, **more: Any) -> dict:
    """config.json; `more` are the family's own keys."""
    block = config.blocks[0]
    return {
        "architectures": [f"{architecture}ForMaskedLM" if config.head else f"{architecture}Model"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": block.ffn.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": block.mixer.n_heads,
        "hidden_act": HF_ACTIVATIONS[block.ffn.activation],
        "max_position_embeddings": config.max_positions + (config.positions.offset if config.positions else 0),
        "type_vocab_size": config.token_types,
        "layer_norm_eps": block.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        **more,
    }


def usual_shape(width: int, depth: int, context: int, **more: Any) -> dict:
    """A config.json for a width; `more` are the family's own keys."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": usual_heads(width),
        "max_position_embeddings": context,
        "layer_norm_eps": 1e-5,
        **more,
    }


def padding_offset(hf: dict) -> LearnedPositions:
    """Positions that begin behind the id of the padding token (fairseq's)."""
    return LearnedPositions(offset=hf.get("pad_token_id", 1) + 1)


def padding_of(config: ModelConfig) -> dict:
    """The key that `padding_offset` reads."""
    return {"pad_token_id": config.positions.offset - 1}


def pairs(theirs: str, ours: str) -> tuple[Row, ...]:
    """A weight and its bias."""
    return tuple(row(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in _KINDS)


def weights(wrapper: str) -> tuple[Row, ...]:
    """Embeddings and layers of a model whose names begin with `wrapper`; norms have their names in `post_norms`."""
    theirs = f"{wrapper}.encoder.layer.{{}}"
    return (
        *(
            row(f"{wrapper}.embeddings.{name}_embeddings.weight", f"{ours}.weight")
            for name, ours in (
                ("word", "embed_tokens"),
                ("position", "embed_positions"),
                ("token_type", "embed_types"),
            )
        ),
        *(
            entry
            for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
            for entry in pairs(f"{theirs}.attention.self.{name}", f"layers.{{}}.mixer.{letter}_proj")
        ),
        *pairs(f"{theirs}.attention.output.dense", "layers.{}.mixer.o_proj"),
        *pairs(f"{theirs}.intermediate.dense", "layers.{}.ffn.up_proj"),
        *pairs(f"{theirs}.output.dense", "layers.{}.ffn.down_proj"),
    )


def post_norms(wrapper: str) -> tuple[Row, ...]:
    theirs = f"{wrapper}.encoder.layer.{{}}"
    return (
        *pairs(f"{wrapper}.embeddings.LayerNorm", "embed_norm"),
        *pairs(f"{theirs}.attention.output.LayerNorm", "layers.{}.mixer_sum_norm"),
        *pairs(f"{theirs}.output.LayerNorm", "layers.{}.ffn_sum_norm"),
    )


def head(prefix: str, transform: str, norm_name: str) -> tuple[Row, ...]:
    return (
        *pairs(f"{transform}.dense", "head_transform.dense"),
        *pairs(f"{transform}.{norm_name}", "head_transform.norm"),
        row(f"{prefix}.bias", "head_bias"),
        *pairs(f"{prefix}.decoder", "lm_head"),
        row(f"{prefix}.bias", f"carried.{_SPARE_BIAS}"),
    )


CLASSIFIER_WEIGHTS = (*pairs("classifier.dense", "classifier.dense"), *pairs("classifier.out_proj", "classifier.out"))
