"""RoBERTa (arXiv:1907.11692): BERT whose positions begin behind the padding token's id; also XLM-RoBERTa and CamemBERT."""

from __future__ import annotations

from llmctl.models.config import ModelConfig
from llmctl.models.families import bert_like

_ARCHITECTURES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
MODEL_TYPES = tuple(_ARCHITECTURES)


def config_from_hf(hf: dict) -> ModelConfig:
    return bert_like.model(hf, [bert_like.attention(hf)], bert_like.padding_offset(hf))


def config_to_hf(config: ModelConfig) -> dict:
    return bert_like.to_hf(config, _ARCHITECTURES[config.family], **bert_like.padding_of(config))


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    return bert_like.usual_shape(width, depth, context, type_vocab_size=1)


WEIGHTS = (
    *bert_like.weights("roberta"),
    *bert_like.post_norms("roberta"),
    *bert_like.head("lm_head", "lm_head", "layer_norm"),
    *bert_like.CLASSIFIER_WEIGHTS,
)
CLASSIFIER = bert_like.CLASSIFIER
IGNORABLE = bert_like.IGNORABLE
SPELLINGS = bert_like.SPELLINGS
