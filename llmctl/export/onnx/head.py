"""In front of the blocks and behind them: embeddings, logits, labels, pooled states."""

from __future__ import annotations

import torch

from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.ffn import activation
from llmctl.export.onnx.graph import FLOAT, INT64, Value
from llmctl.export.onnx.linear import linear, product
from llmctl.export.onnx.norm import norm
from llmctl.models import config

EMBEDDING = "embed_tokens.weight"


def embedded(b: Builder, spec: config.ModelConfig, ids: Value) -> Value:
    """[B, T, D], scaled where the model scales, in its own dtype."""
    x = b.graph.op("Gather", b.weight(EMBEDDING), ids, axis=0)
    return x if spec.embedding_scale == 1.0 else x * spec.embedding_scale


def logits(b: Builder, spec: config.ModelConfig, x: Value) -> Value:
    """[B, T, V] of hidden states."""
    head = spec.head
    if head.transform is not None:
        x = activation(head.transform.activation, linear(b, "head_transform.dense", x))
        x = norm(b, head.transform.norm, "head_transform.norm", x)
    x = x if head.scale == 1.0 else x * head.scale
    y = _tied(b, spec, x) if spec.tie_embeddings else linear(b, "lm_head", x)
    if head.bias == "fixed" and "logits_bias" in b.weights:
        y = y + b.weight("logits_bias")
    return y if head.softcap is None else b.graph.op("Tanh", y / head.softcap) * head.softcap


def labels(b: Builder, spec: config.Classifier, x: Value, mask: Value) -> Value:
    """[B, labels] of the hidden states at each text's first or last token."""
    g = b.graph
    real = mask.compare("Greater", 0).cast(INT64)
    if spec.at == "last":  # the largest place of a real token
        places = g.range(0, mask.size(1)).unsqueeze(0) * real
        place = g.op("ReduceMax", places, g.ints(1), keepdims=1)
    else:
        place = g.op("ArgMax", real, axis=1, keepdims=1)
    x = g.op("GatherND", x, place, batch_dims=1)
    if spec.dense:
        x = g.op("Tanh", linear(b, "classifier.dense", x))
    return linear(b, "classifier.out", x)


def pooled(b: Builder, how: str, x: Value, mask: Value) -> Value:
    """[B, D]: the mean of the real tokens, or the first or the last of them."""
    g = b.graph
    real = mask.compare("Greater", 0)
    if how == "mean":
        weights = real.cast(FLOAT).unsqueeze(2)
        return ((x.cast(FLOAT) * weights).sum(1, keepdims=False) / weights.sum(1, keepdims=False)).cast(x.type)
    flags = real.cast(INT64)
    if how == "cls":
        place = g.op("ArgMax", flags, axis=1, keepdims=1)
    else:
        place = g.op("ReduceMax", g.range(0, mask.size(1)).unsqueeze(0) * flags, g.ints(1), keepdims=1)
    return g.op("GatherND", x, place, batch_dims=1)


def _tied(b: Builder, spec: config.ModelConfig, x: Value) -> Value:
    """With the embedding's own rows: Gemm, unlike MatMul, takes them as they lie, so that they are stored once."""
    bias = b.weight("head_bias") if "head_bias" in b.weights else None
    if b.quantization is not None:
        return product(b, "head.weight", b.weights.plain(EMBEDDING), x, bias)
    g, rows = b.graph, x.reshape(-1, spec.d_model)
    inputs = (rows, b.weight(EMBEDDING), *(() if bias is None else (bias,)))
    y = g.op("Gemm", *inputs, transB=1)
    return g.op("Reshape", y, g.concat(x.size(0), x.size(1), g.ints(spec.vocab_size), axis=0))


def without_masks(b: Builder, spec: config.TokenDropout, x: Value, ids: Value, mask: Value) -> Value:
    """Embeddings with masked tokens zero, and the others scaled as if as many were masked as in training (ESM-2)."""
    g = b.graph
    is_mask = ids.compare("Equal", spec.mask_id)
    count, n_masks = (part.cast(FLOAT).sum(1) for part in (mask, is_mask.cast(INT64) * mask))
    left = g.op("Max", count - n_masks, g.constant(torch.tensor(1.0)))
    factor = (count / left) * (1 - spec.trained_share)
    x = (x.cast(FLOAT) * factor.unsqueeze(2)).cast(x.type)
    return g.where(is_mask.unsqueeze(2), 0.0, x)
