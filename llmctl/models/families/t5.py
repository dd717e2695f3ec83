"""T5 (arXiv:1910.10683), and with a gated ffn and a head of its own T5 v1.1 and Flan-T5: RMSNorm in front of each branch,
positions as a bias on the scores, which are not scaled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llmctl.models.config import Attention, Block, GatedMlp, Head, Mlp, ModelConfig, Norm, RelativeBias
from llmctl.models.families.common import (
    ACTIVATIONS,
    DECODERS_END,
    DECODERS_END_WEIGHTS,
    HF_ACTIVATIONS,
    Row,
    row,
    usual_heads,
)

MODEL_TYPES = ("t5",)
_TANH_GELU = "gated-gelu"  # by that name T5 means the approximation


def config_from_hf(hf: dict) -> ModelConfig:
    norm = Norm("rms", hf.get("layer_norm_epsilon", 1e-6))
    ffn = _ffn(hf.get("feed_forward_proj", "relu"), hf["d_ff"])
    n_heads = hf["num_heads"]
    n_buckets, reach = hf.get("relative_attention_num_buckets", 32), hf.get("relative_attention_max_distance", 128)
    shared = {"family": "t5", "vocab_size": hf["vocab_size"], "d_model": hf["d_model"], "max_positions": None}
    shared |= {"final_norm": norm, "initializer_range": hf.get("initializer_factor", 1.0)}

    def attention(causal: bool) -> Attention:
        return Attention(n_heads, n_heads, hf["d_kv"], causal=causal, scale=1.0)

    encoder = ModelConfig(
        n_layers=hf["num_layers"],
        blocks=(Block(attention(causal=False), ffn, norm),),
        positions=RelativeBias(n_heads, n_buckets, reach, both_ways=True),
        **shared,
    )
    tied = hf.get("tie_word_embeddings", True)
    return ModelConfig(
        n_layers=hf.get("num_decoder_layers") or hf["num_layers"],
        blocks=(Block(attention(causal=True), ffn, norm, cross_attention=attention(causal=False)),),
        positions=RelativeBias(n_heads, n_buckets, reach),
        head=Head(scale=hf["d_model"] ** -0.5 if hf.get("scale_decoder_outputs", tied) else 1.0),
        tie_embeddings=tied,
        encoder=encoder,
        decoder_start_id=hf.get("decoder_start_token_id", hf.get("pad_token_id")),
        hf=hf,
        **shared,
    )


def config_to_hf(config: ModelConfig) -> dict:
    mixer, ffn = config.blocks[0].mixer, config.blocks[0].ffn
    gated = f"gated-{HF_ACTIVATIONS[ffn.activation]}"
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.decoder_start_id,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": mixer.head_dim,
        "d_ff": ffn.d_ff,
        "num_layers": config.encoder.n_layers,
        "num_decoder_layers": config.n_layers,
        "num_heads": mixer.n_heads,
        "relative_attention_num_buckets": config.positions.n_buckets,
        "relative_attention_max_distance": config.positions.max_distance,
        "layer_norm_epsilon": config.final_norm.eps,
        "feed_forward_proj": gated.replace("gelu_new", "gelu") if isinstance(ffn, GatedMlp) else gated[6:],
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.head.scale != 1.0,
        "initializer_factor": config.initializer_range,
    }


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    """v1.1's, half of the blocks in the encoder."""
    heads = usual_heads(width)
    return {
        "d_model": width,
        "d_kv": width // heads,
        "d_ff": -(-8 * width // 3 // 32) * 32,
        "num_layers": max(2, depth // 2),
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


def _ffn(projection: str, d_ff: int) -> Mlp | GatedMlp:
    activation = "gelu_tanh" if projection == _TANH_GELU else ACTIVATIONS[projection.removeprefix("gated-")]
    return GatedMlp(d_ff, activation) if projection.startswith("gated-") else Mlp(d_ff, activation, bias=False)


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return tuple(row(f"{theirs}.{name}.weight", f"{ours}.{name}_proj.weight") for name in "qkvo")


def _stack(name: str, prefix: str, ffn: str) -> tuple[Row, ...]:
    """Rows of a stack whose feed-forward layer is sublayer number `ffn`."""
    layer, ours = f"{name}.block.{{}}.layer", f"{prefix}layers.{{}}"
    dense = f"{layer}.{ffn}.DenseReluDense"
    gate = f"{ours}.ffn.gate_proj.weight"
    return (
        row(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{prefix}relative_bias.weight"),
        *_attention(f"{layer}.0.SelfAttention", f"{ours}.mixer"),
        row(f"{layer}.0.layer_norm.weight", f"{ours}.mixer_norm.weight"),
        row(f"{dense}.wi.weight", f"{ours}.ffn.up_proj.weight", without=gate),
        row(f"{dense}.wi_0.weight", gate),
        row(f"{dense}.wi_1.weight", f"{ours}.ffn.up_proj.weight", beside=gate),
        row(f"{dense}.wo.weight", f"{ours}.ffn.down_proj.weight"),
        row(f"{layer}.{ffn}.layer_norm.weight", f"{ours}.ffn_norm.weight"),
        row(f"{name}.final_layer_norm.weight", f"{prefix}norm.weight"),
    )


def _under_heads(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a language model, and those of a classifier, which has a wrapper in front of all but its head."""
    head, rows = DECODERS_END_WEIGHTS[-1].ours[0], tuple(rows)
    plain = (replace(each, without=(*each.without, head)) for each in rows)
    wrapped = (replace(each, theirs=f"transformer.{each.theirs}", beside=(*each.beside, head)) for each in rows)
    return (*plain, *wrapped)


_MODEL = (
    row("shared.weight", "embed_tokens.weight"),
    *_stack("encoder", "encoder.", ffn="1"),
    *_stack("decoder", "", ffn="2"),
    *_attention("decoder.block.{}.layer.1.EncDecAttention", "layers.{}.cross"),
    row("decoder.block.{}.layer.1.layer_norm.weight", "layers.{}.cross_norm.weight"),
)
WEIGHTS = (*_under_heads(_MODEL), row("lm_head.weight", "lm_head.weight"), *DECODERS_END_WEIGHTS)
CLASSIFIER = DECODERS_END
SPELLINGS = ((r"^transformer\.", ""),)
IGNORABLE = (r"^(transformer\.)?(encoder|decoder)\.embed_tokens\.weight$", r"EncDecAttention\.relative_attention_bias")
