"""The graph of a decoder: ids, mask and cache to logits and cache, under optimum's names."""

from __future__ import annotations

from llmctl.export.onnx import head
from llmctl.export.onnx.attention import KeyValues, groups_queries
from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import INT64, Value
from llmctl.export.onnx.stack import Stack
from llmctl.export.onnx.visibility import Places
from llmctl.models import config, rope_scaling

BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
KINDS = ("key", "value")


def build(b: Builder, spec: config.ModelConfig) -> None:
    """With a cache; a classifier reads a whole text and has none."""
    b.groups = b.fuse and spec.classifier is None and groups_queries(spec)
    g, recurs = b.graph, isinstance(spec.block(0).mixer, config.Recurrent)
    ids = g.input("input_ids", INT64, [BATCH, LENGTH])
    cached = spec.classifier is None
    mask = g.input("attention_mask", INT64, [BATCH, TOTAL if cached and not recurs else LENGTH])
    positions = _positions(b, spec, mask, cached)
    caches = _recurrent_caches(b, spec) if recurs else _caches(b, spec) if cached else []
    places = Places(b, *_ends(b, ids, mask), positions, mask, mask.sum(1), mask.sum(1, keepdims=False))
    stack = Stack(b, spec, caches=caches)
    x = stack.run(head.embedded(b, spec, ids), places)
    if spec.classifier is not None:
        g.output("logits", head.labels(b, spec.classifier, x, mask), [BATCH, len(spec.classifier.labels)])
        return
    g.output("logits", head.logits(b, spec, x), [BATCH, LENGTH, spec.vocab_size])
    for cache, present in zip(caches, stack.present, strict=True):
        for name, value in zip(cache.names, present, strict=True):
            width = _width(spec)
            g.output(name, value, [BATCH, spec.d_model] if recurs else [BATCH, width[0], TOTAL, width[1]])


def pads_right(spec: config.ModelConfig, groups: bool) -> bool:
    """Whether rows are filled up behind their texts: so GroupQueryAttention counts, and recurrent layers stop there."""
    return groups or isinstance(spec.block(0).mixer, config.Recurrent)


def needs_positions(spec: config.ModelConfig, groups: bool) -> bool:
    """Whether anything in the graph reads `position_ids`."""
    if isinstance(spec.positions, config.LearnedPositions):
        return True
    ropes = (getattr(spec.block(layer).mixer, "rope", None) for layer in range(spec.n_layers))
    return any(rope and (rope_scaling.heeds_length(rope) or not groups) for rope in ropes)


def _positions(b: Builder, spec: config.ModelConfig, mask: Value, cached: bool) -> Value | None:
    if cached:
        return b.graph.input("position_ids", INT64, [BATCH, LENGTH]) if needs_positions(spec, b.groups) else None
    return counted(b, mask)


def counted(b: Builder, mask: Value) -> Value:
    """Positions [B, T] behind the padding in front of each row."""
    g = b.graph
    steps = g.op("CumSum", mask, g.ints(1).squeeze(0)) - 1
    return g.op("Max", steps, g.ints(0))


def _ends(b: Builder, ids: Value, mask: Value) -> tuple[Value, Value]:
    """The places of queries and keys."""
    total = mask.size(1)
    return b.graph.range(total - ids.size(1), total), b.graph.range(0, total)


def _width(spec: config.ModelConfig) -> tuple[int, int]:
    mixer = spec.block(0).mixer
    return getattr(mixer, "n_kv_heads", 0), getattr(mixer, "head_dim", 0)


def _caches(b: Builder, spec: config.ModelConfig) -> list[KeyValues]:
    heads, head_dim = _width(spec)
    shape = [BATCH, heads, PAST, head_dim]
    return [
        KeyValues(
            tuple(b.graph.input(f"past_key_values.{layer}.{kind}", b.graph.type, shape) for kind in KINDS),
            tuple(f"present.{layer}.{kind}" for kind in KINDS),
        )
        for layer in range(spec.n_layers)
    ]


def _recurrent_caches(b: Builder, spec: config.ModelConfig) -> list[KeyValues]:
    parts = ("hidden", "cell")[: len(spec.block(0).mixer.state_shapes)]
    return [
        KeyValues(
            tuple(b.graph.input(f"past_states.{layer}.{part}", b.graph.type, [BATCH, spec.d_model]) for part in parts),
            tuple(f"present_states.{layer}.{part}" for part in parts),
        )
        for layer in range(spec.n_layers)
    ]
