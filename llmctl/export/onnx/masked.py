"""The graph of an encoder: ids and mask to logits, hidden states and one vector for each text."""

from __future__ import annotations

from llmctl.export.onnx import head
from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.causal import BATCH, LENGTH, counted
from llmctl.export.onnx.graph import INT64
from llmctl.export.onnx.stack import Stack
from llmctl.export.onnx.visibility import Places
from llmctl.models import config


def build(b: Builder, spec: config.ModelConfig, pooling: str) -> None:
    """`pooling` is that of the output sentence_embedding: mean, cls or last."""
    g = b.graph
    ids, mask = (g.input(name, INT64, [BATCH, LENGTH]) for name in ("input_ids", "attention_mask"))
    types = g.input("token_type_ids", INT64, [BATCH, LENGTH]) if spec.token_types > 1 else None
    x = head.embedded(b, spec, ids)
    if spec.token_dropout is not None:
        x = head.without_masks(b, spec.token_dropout, x, ids, mask)
    x = Stack(b, spec).run(x, places_of(b, mask), types)
    if spec.classifier is not None:
        g.output("logits", head.labels(b, spec.classifier, x, mask), [BATCH, len(spec.classifier.labels)])
    elif spec.head is not None:
        g.output("logits", head.logits(b, spec, x), [BATCH, LENGTH, spec.vocab_size])
    g.output("last_hidden_state", x, [BATCH, LENGTH, spec.d_model])
    g.output("sentence_embedding", head.pooled(b, pooling, x, mask), [BATCH, spec.d_model])


def places_of(b: Builder, mask) -> Places:
    """Of an encoder's tokens, which all see each other."""
    steps = b.graph.range(0, mask.size(1))
    return Places(b, steps, steps, counted(b, mask), mask)
