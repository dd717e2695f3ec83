"""Positions: what they add to embeddings, how they turn queries and keys, and what distance adds to scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import FLOAT, MICROSOFT, Value
from llmctl.models import config, position, rope_scaling


@dataclass(frozen=True)
class Turn:
    """cos and sin [B or 1, 1, T, dims / 2], for the first `dims` elements of a head."""

    cos: Value
    sin: Value
    dims: int

    def of(self, x: Value, head_dim: int) -> Value:
        """Of x [B, H, T, K] each pair (i, i + dims/2) by its angle."""
        half = self.dims // 2
        first, second, *rest = x.split(half, half, *([head_dim - self.dims] if head_dim > self.dims else []))
        turned = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        return x.graph.concat(*turned, *rest)


def turn(b: Builder, rope: config.Rope, head_dim: int, positions: Value, lengths: Value | None) -> Turn:
    """For `positions` int64 [B, T] in texts of `lengths` int64 [B, 1], which rules that heed the length need."""
    g, dims = b.graph, rope.dims or head_dim

    def make() -> Turn:
        steps = positions.cast(FLOAT).unsqueeze(2)
        angles = (steps * _frequencies(b, rope, dims, lengths)).unsqueeze(1)
        size = rope_scaling.magnitude(rope)
        both = (g.op(kind, angles) for kind in ("Cos", "Sin"))
        cos, sin = ((x if size == 1.0 else x * size).cast(g.type) for x in both)
        return Turn(cos, sin, dims)

    return g.once(("turn", _key(rope), dims, positions.name), make)


def tables(b: Builder, rope: config.Rope, head_dim: int, count: int) -> tuple[Value, Value]:
    """cos and sin [count, dims / 2] of all positions, for operators that look them up."""
    dims = rope.dims or head_dim

    def make() -> tuple[Value, Value]:
        frequencies = _fixed(b, rope, dims)
        angles, size = torch.outer(torch.arange(count).float(), frequencies), rope_scaling.magnitude(rope)
        return b.table(angles.cos() * size), b.table(angles.sin() * size)

    return b.graph.once(("tables", _key(rope), dims, count), make)


def turned_by_table(b: Builder, rope: config.Rope, x: Value, heads: int, head_dim: int, positions: Value, count: int):
    """Through onnxruntime's operator: x [B, T, H K], positions below `count`."""
    cos, sin = tables(b, rope, head_dim, count)
    part = {} if rope.dims is None else {"rotary_embedding_dim": rope.dims}
    return b.graph.op("RotaryEmbedding", x, positions, cos, sin, domain=MICROSOFT, num_heads=heads, **part)


def relative_bias(b: Builder, spec: config.RelativeBias, name: str, queries: Value, keys: Value) -> Value:
    """[1, H, 1, T, S] for query places [T] and key places [S]: a row of a table for each distance.

    Beyond `max_distance` all distances share a bucket, so a table of the near ones holds all.
    """
    g, reach = b.graph, spec.max_distance
    buckets = position.RelativeBias.buckets(_Buckets(spec), torch.arange(-reach, reach + 1))
    shape = (2 * reach + 1, spec.n_heads)
    table = g.weight(f"{name}.table", b.weights.lazy(f"{name}.weight", shape, lambda weight: weight[buckets]))
    distances = keys.unsqueeze(0) - queries.unsqueeze(1)
    bounds = (g.number(limit, distances.type) for limit in (-reach, reach))
    near = g.op("Clip", distances, *bounds) + reach
    return g.op("Gather", table, near, type=table.type, axis=0).transpose(2, 0, 1).unsqueeze(0, 2)


@dataclass
class _Buckets:
    spec: config.RelativeBias


def learned(b: Builder, spec: config.LearnedPositions, name: str, positions: Value) -> Value:
    """What positions int64 [B or 1, T] add to an embedding, [B or 1, T, D]."""
    table = b.weight(f"{name}.weight")
    return b.graph.op("Gather", table, positions + spec.offset if spec.offset else positions, axis=0)


def _frequencies(b: Builder, rope: config.Rope, dims: int, lengths: Value | None) -> Value:
    """Radians per position, [dims / 2], or [B, 1, dims / 2] where a text's length counts."""
    if not rope_scaling.heeds_length(rope):
        return b.graph.constant(_fixed(b, rope, dims))
    rule = {"longrope": _longrope, "dynamic": _dynamic}[rope.scaling["rope_type"]]
    return rule(b, rope, dims, lengths.unsqueeze(2))


def _longrope(b: Builder, rope: config.Rope, dims: int, lengths: Value) -> Value:
    """One of two sets, by the length."""
    original = rope.scaling["original_max_position_embeddings"]
    short, long = (b.graph.constant(rope_scaling.frequencies(rope, dims, torch.tensor(n))) for n in (1, original + 1))
    return b.graph.where(lengths.compare("Greater", original), long, short)


def _dynamic(b: Builder, rope: config.Rope, dims: int, lengths: Value) -> Value:
    """theta grows with the length beyond that of training: 1 / (theta * stretch^(dims / (dims - 2)))^(2i / dims)."""
    g, factor, original = b.graph, rope.scaling["factor"], rope.scaling["original_max_position_embeddings"]
    longest = g.op("Max", lengths, g.ints(original)).cast(FLOAT)
    stretch = longest * (factor / original) - (factor - 1.0)
    exponents = torch.arange(0, dims, 2).float() / (dims - 2)
    plain = g.constant(rope_scaling.frequencies(config.Rope(rope.theta), dims))
    return plain / g.op("Pow", stretch, g.constant(exponents))


def _fixed(b: Builder, rope: config.Rope, dims: int) -> torch.Tensor:
    """Where no length counts; ESM-2's checkpoints bring their own."""
    name = "rotaries.0.frequencies"
    if rope.stored and name in b.weights:
        return b.weights.read(name).float()
    return rope_scaling.frequencies(rope, dims)


def _key(rope: config.Rope) -> str:
    return repr(rope)
