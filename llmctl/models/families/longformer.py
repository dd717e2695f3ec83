"""Longformer (arXiv:2004.05150): RoBERTa whose tokens see a window, and some global tokens see all."""

from __future__ import annotations

from llmctl.models.config import LocalAttention, ModelConfig
from llmctl.models.families import bert_like

MODEL_TYPES = ("longformer",)


def config_from_hf(hf: dict) -> ModelConfig:
    windows = hf.get("attention_window", 512)
    if isinstance(windows, int):
        windows = [windows]
    n_heads = hf["num_attention_heads"]
    mixers = [LocalAttention(n_heads, hf["hidden_size"] // n_heads, window // 2) for window in windows]
    return bert_like.model(hf, mixers[:1] if len(set(mixers)) == 1 else mixers, bert_like.padding_offset(hf))


def config_to_hf(config: ModelConfig) -> dict:
    windows = [2 * config.block(i).mixer.radius for i in range(config.n_layers)]
    return bert_like.to_hf(config, "Longformer", attention_window=windows, **bert_like.padding_of(config))


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    window = max(2, min(512, context // 4) // 2 * 2)
    return bert_like.usual_shape(width, depth, context, type_vocab_size=1, attention_window=[window] * depth)


WEIGHTS = (
    *bert_like.weights("longformer"),
    *(
        entry
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
        for entry in bert_like.pairs(
            f"longformer.encoder.layer.{{}}.attention.self.{name}_global", f"layers.{{}}.mixer.global_{letter}_proj"
        )
    ),
    *bert_like.post_norms("longformer"),
    *bert_like.head("lm_head", "lm_head", "layer_norm"),
    *bert_like.CLASSIFIER_WEIGHTS,
)
CLASSIFIER = bert_like.CLASSIFIER
IGNORABLE = bert_like.IGNORABLE
SPELLINGS = bert_like.SPELLINGS
