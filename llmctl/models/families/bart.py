"""BART (arXiv:1910.13461): norms behind each branch, learned positions, an embedding norm; mBART (arXiv:2001.08210) has the
norms in front, and one at the end."""

from __future__ import annotations

from dataclasses import replace

from llmctl.models.config import Attention, Block, Head, LearnedPositions, Mlp, ModelConfig, Norm
from llmctl.models.families.common import (
    ACTIVATIONS,
    DECODERS_END,
    DECODERS_END_WEIGHTS,
    HF_ACTIVATIONS,
    Row,
    row,
    usual_heads,
)

MODEL_TYPES = ("bart", "mbart")
_CLASSES = {"bart": "BartForConditionalGeneration", "mbart": "MBartForConditionalGeneration"}
_NORM = Norm("layer", 1e-5)


def config_from_hf(hf: dict) -> ModelConfig:
    d_model, family = hf["d_model"], hf["model_type"]
    activation = ACTIVATIONS[hf.get("activation_function", "gelu")]
    shared = {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "d_model": d_model,
        "max_positions": hf.get("max_position_embeddings", 1024),
        "positions": LearnedPositions(offset=2),
        "embedding_scale": d_model**0.5 if hf.get("scale_embedding", False) else 1.0,
        "embedding_norm": _NORM,
        "final_norm": _NORM if family == "mbart" else None,
        "initializer_range": hf.get("init_std", 0.02),
    }

    def block(side: str, causal: bool) -> Block:
        def attention(causal: bool) -> Attention:
            n_heads = hf[f"{side}_attention_heads"]
            return Attention(n_heads, n_heads, d_model // n_heads, qkv_bias=True, out_bias=True, causal=causal)

        return Block(
            attention(causal),
            Mlp(hf[f"{side}_ffn_dim"], activation),
            _NORM,
            norm_placement="pre" if family == "mbart" else "post",
            cross_attention=attention(causal=False) if causal else None,
        )

    return ModelConfig(
        n_layers=hf["decoder_layers"],
        blocks=(block("decoder", causal=True),),
        head=Head(bias="fixed"),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        decoder_start_id=hf.get("decoder_start_token_id", hf.get("eos_token_id") if family == "bart" else None),
        encoder=ModelConfig(n_layers=hf["encoder_layers"], blocks=(block("encoder", causal=False),), **shared),
        hf=hf,
        **shared,
    )


def config_to_hf(config: ModelConfig) -> dict:
    sides = {}
    for side, stack in (("encoder", config.encoder), ("decoder", config)):
        block = stack.blocks[0]
        sides |= {f"{side}_layers": stack.n_layers, f"{side}_ffn_dim": block.ffn.d_ff}
        sides[f"{side}_attention_heads"] = block.mixer.n_heads
    return {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.decoder_start_id,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        **sides,
        "max_position_embeddings": config.max_positions,
        "activation_function": HF_ACTIVATIONS[config.blocks[0].ffn.activation],
        "scale_embedding": config.embedding_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
        "init_std": config.initializer_range,
    }


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    sides = {f"{side}_layers": max(2, depth // 2) for side in ("encoder", "decoder")}
    sides |= {f"{side}_attention_heads": usual_heads(width) for side in ("encoder", "decoder")}
    sides |= {f"{side}_ffn_dim": 4 * width for side in ("encoder", "decoder")}
    return {"d_model": width, **sides, "max_position_embeddings": context}


def _pairs(theirs: str, ours: str) -> tuple[Row, ...]:
    return tuple(row(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias"))


def _attention(theirs: str, ours: str, norm: str) -> tuple[Row, ...]:
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    rows = (_pairs(f"{theirs}.{name}", f"{ours}.{ourname}") for name, ourname in names.items())
    return (*sum(rows, ()), *_norm(f"{theirs}_layer_norm", norm))


def _norm(theirs: str, branch: str) -> tuple[Row, ...]:
    """Behind the sum or in front of the branch: a block has one of the two."""
    return (*_pairs(theirs, f"{branch}_sum_norm"), *_pairs(theirs, f"{branch}_norm"))


def _stack(name: str, prefix: str) -> tuple[Row, ...]:
    theirs, ours = f"model.{name}.layers.{{}}", f"{prefix}layers.{{}}"
    return (
        row(f"model.{name}.embed_positions.weight", f"{prefix}embed_positions.weight"),
        *_pairs(f"model.{name}.layernorm_embedding", f"{prefix}embed_norm"),
        *_attention(f"{theirs}.self_attn", f"{ours}.mixer", f"{ours}.mixer"),
        *_pairs(f"{theirs}.fc1", f"{ours}.ffn.up_proj"),
        *_pairs(f"{theirs}.fc2", f"{ours}.ffn.down_proj"),
        *_norm(f"{theirs}.final_layer_norm", f"{ours}.ffn"),
        *_pairs(f"model.{name}.layer_norm", f"{prefix}norm"),
    )


WEIGHTS = (
    row("model.shared.weight", "embed_tokens.weight"),
    *_stack("encoder", "encoder."),
    *_stack("decoder", ""),
    *_attention("model.decoder.layers.{}.encoder_attn", "layers.{}.cross", "layers.{}.cross"),
    row("lm_head.weight", "lm_head.weight"),
    row("final_logits_bias", "logits_bias", change="as_row"),
    *DECODERS_END_WEIGHTS,
)
CLASSIFIER = {"bart": DECODERS_END, "mbart": replace(DECODERS_END, wraps=True)}
IGNORABLE = (r"(encoder|decoder)\.embed_tokens\.weight$", r"^(model\.)?(encoder|decoder)\.version$")
