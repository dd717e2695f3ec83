"""ESM-1b and ESM-2 (doi:10.1126/science.ade2574): protein encoders with norms in front of each branch, and positions that
are learned or rotary."""

from __future__ import annotations

from llmctl.models.config import Block, Carried, Head, HeadTransform, Mlp, ModelConfig, Norm, Rope, TokenDropout
from llmctl.models.families import bert_like
from llmctl.models.families.common import row

MODEL_TYPES = ("esm",)


def config_from_hf(hf: dict) -> ModelConfig:
    norm = bert_like.norm(hf)
    is_rotary = {"absolute": False, "rotary": True}[hf.get("position_embedding_type", "absolute")]
    rope = Rope(hf.get("rope_theta", 10000.0), stored=True) if is_rotary else None
    mixer = bert_like.attention(hf, rope=rope)
    mask_id = hf.get("mask_token_id")
    n_maps = hf["num_hidden_layers"] * hf["num_attention_heads"]
    return bert_like.model(
        {"max_position_embeddings": 1026, **hf},
        [mixer],
        None if is_rotary else bert_like.padding_offset(hf),
        blocks=(Block(mixer, Mlp(hf["intermediate_size"], "gelu"), norm),),
        final_norm=norm,
        embedding_norm=norm if hf.get("emb_layer_norm_before") else None,
        token_types=0,
        token_dropout=TokenDropout(mask_id) if hf.get("token_dropout") and mask_id is not None else None,
        head=Head(HeadTransform("gelu", Norm("layer", norm.eps)), bias=True),
        # Predicts contacts from attention maps; transformers expects it in every checkpoint.
        carried=(Carried("contact_weight", (1, n_maps)), Carried("contact_bias", (1,))),
    )


def config_to_hf(config: ModelConfig) -> dict:
    rope, dropout = config.blocks[0].mixer.rope, config.token_dropout
    hf = bert_like.to_hf(
        config,
        "Esm",
        position_embedding_type="rotary" if rope else "absolute",
        emb_layer_norm_before=config.embedding_norm is not None,
        token_dropout=dropout is not None,
        **({"rope_theta": rope.theta} if rope else bert_like.padding_of(config)),
        **({"mask_token_id": dropout.mask_id} if dropout else {}),
    )
    return {key: value for key, value in hf.items() if key not in ("hidden_act", "type_vocab_size")}


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    return bert_like.usual_shape(width, depth, context, position_embedding_type="rotary", token_dropout=True)


WEIGHTS = (
    *bert_like.weights("esm"),
    *bert_like.pairs("esm.embeddings.layer_norm", "embed_norm"),
    *bert_like.pairs("esm.encoder.layer.{}.attention.LayerNorm", "layers.{}.mixer_norm"),
    *bert_like.pairs("esm.encoder.layer.{}.LayerNorm", "layers.{}.ffn_norm"),
    *bert_like.pairs("esm.encoder.emb_layer_norm_after", "norm"),
    row("esm.rotary_embeddings.inv_freq", "rotaries.0.frequencies"),
    *(row(f"esm.contact_head.regression.{kind}", f"carried.contact_{kind}") for kind in ("weight", "bias")),
    *bert_like.pairs("lm_head.dense", "head_transform.dense"),
    *bert_like.pairs("lm_head.layer_norm", "head_transform.norm"),
    row("lm_head.bias", "head_bias"),
    row("lm_head.bias", "lm_head.bias"),
    row("lm_head.decoder.weight", "lm_head.weight"),
    *bert_like.CLASSIFIER_WEIGHTS,
)
CLASSIFIER = bert_like.CLASSIFIER
IGNORABLE = (*bert_like.IGNORABLE, r"position_embeddings\.weight$", r"\.rotary_embeddings\.inv_freq$")
SPELLINGS = (
    *bert_like.SPELLINGS,
    (r"^(esm\.)?encoder\.layer\.[0*]\.attention\.self\.rotary_embeddings\.", "esm.rotary_embeddings."),
)
