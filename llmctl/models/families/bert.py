"""BERT (arXiv:1810.04805): an encoder with norms behind each branch, learned positions and token types."""

from __future__ import annotations

from llmctl.models.config import LearnedPositions, ModelConfig
from llmctl.models.families import bert_like

MODEL_TYPES = ("bert",)


def config_from_hf(hf: dict) -> ModelConfig:
    return bert_like.model(hf, [bert_like.attention(hf)], LearnedPositions())


def config_to_hf(config: ModelConfig) -> dict:
    return bert_like.to_hf(config, "Bert")


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    return bert_like.usual_shape(width, depth, context)


WEIGHTS = (
    *bert_like.weights("bert"),
    *bert_like.post_norms("bert"),
    *bert_like.head("cls.predictions", "cls.predictions.transform", "LayerNorm"),
    *bert_like.pairs("bert.pooler.dense", "classifier.dense"),
    *bert_like.pairs("classifier", "classifier.out"),
)
CLASSIFIER = bert_like.CLASSIFIER
IGNORABLE = bert_like.IGNORABLE
SPELLINGS = bert_like.SPELLINGS
