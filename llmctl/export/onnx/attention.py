"""Attention in plain operators, and as onnxruntime's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmctl.export.onnx import positions
from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import INT32, MICROSOFT, Value
from llmctl.export.onnx.linear import linear
from llmctl.export.onnx.norm import norm
from llmctl.export.onnx.visibility import Places
from llmctl.models import config, rope_scaling


@dataclass(frozen=True)
class KeyValues:
    """A layer's cache: keys and values [B, G, P, K] that come in, and the names under which all go out.

    `past` None: there is none; `names` None: nothing goes out.
    """

    past: tuple[Value, Value] | None = None
    names: tuple[str, str] | None = None


def attention(
    b: Builder,
    spec: config.Attention,
    name: str,
    x: Value,
    places: Places,
    cache: KeyValues,
    bias: Value | None,
    max_positions: int | None,
) -> tuple[Value, tuple[Value, Value]]:
    """(branch output [B, T, D], all keys and values so far). `bias` [1, H, 1, T, S] is added to the scores."""
    if b.groups:
        return _fused(b, spec, name, x, places, cache, max_positions)
    if b.fuse and sees_both_ways(spec):
        return _both_ways(b, spec, name, x, places, bias, max_positions), ()
    q, k, v = (linear(b, f"{name}.{part}_proj", x) for part in "qkv")
    q, k = _normalized(b, spec, f"{name}.q_norm", q), _normalized(b, spec, f"{name}.k_norm", k)
    v = heads(v, spec.n_kv_heads, spec.head_dim)
    if spec.rope is not None:
        q, k = (_rotated(b, spec, part, places) for part in (q, k))
    if cache.past is not None:
        k, v = (b.graph.concat(old, new, axis=2) for old, new in zip(cache.past, (k, v)))
    y = attend(b, spec, q, k, v, places.visible(spec.causal, spec.window), bias)
    return linear(b, f"{name}.o_proj", y), (k, v)


def groups_queries(spec: config.ModelConfig) -> bool:
    """Whether onnxruntime's GroupQueryAttention computes all layers of a decoder."""
    mixers = [spec.block(layer).mixer for layer in range(spec.n_layers)]
    return all(isinstance(mixer, config.Attention) and _fits(mixer) for mixer in mixers)


def sees_both_ways(spec: config.Attention) -> bool:
    """Whether onnxruntime's MultiHeadAttention computes it: that of encoders, and of decoders to a source."""
    return not spec.causal and spec.softcap is None and spec.n_heads == spec.n_kv_heads


def over_all(
    b: Builder, spec: config.Attention, q: Value, k: Value, v: Value, mask: Value, bias: Value | None = None
) -> Value:
    """Attention to all real keys in one operator: q [B, T, H K], k and v [B, S, H K] or [B, H, S, K] -> [B, T, H K]."""
    how = {"num_heads": spec.n_heads, "scale": spec.head_dim**-0.5 if spec.scale is None else spec.scale}
    mask = b.graph.once(("mask", mask.name), lambda: mask.cast(INT32))
    inputs = (q, k, v, None, mask, None if bias is None else bias.squeeze(2))
    return b.graph.op("MultiHeadAttention", *inputs, domain=MICROSOFT, **how)


def _both_ways(b: Builder, spec, name, x, places: Places, bias: Value | None, max_positions: int | None) -> Value:
    q, k, v = linear(b, [f"{name}.{part}_proj" for part in "qkv"], x).split(*[spec.n_heads * spec.head_dim] * 3)
    q, k = (_normalized(b, spec, f"{name}.{part}_norm", value, as_heads=False) for part, value in (("q", q), ("k", k)))
    if spec.rope is not None:
        where = (spec.n_heads, spec.head_dim, places.positions, max_positions)
        q, k = (positions.turned_by_table(b, spec.rope, part, *where) for part in (q, k))
    return linear(b, f"{name}.o_proj", over_all(b, spec, q, k, v, places.mask, bias))


def _fits(spec: config.Attention) -> bool:
    turned = 0 if spec.rope is None else spec.rope.dims or spec.head_dim
    return spec.causal and spec.head_dim % 8 == 0 and turned % 16 == 0


def attend(
    b: Builder, spec: config.Attention, q: Value, k: Value, v: Value, visible: Value | None, bias: Value | None
) -> Value:
    """softmax(softcap(scale q k^T) + bias) v -> [B, T, H K], for q [B, H, T, K], k and v [B, G, S, K].

    The queries that share a head of keys are a dimension of their own, so that no keys are copied for them.
    """
    g, n_groups = b.graph, spec.n_kv_heads
    repeats = spec.n_heads // n_groups
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    q = (q * scale).reshape(0, n_groups, repeats, -1, spec.head_dim)
    scores = q @ k.transpose(0, 1, 3, 2).unsqueeze(2)
    if spec.softcap is not None:
        scores = g.op("Tanh", scores / spec.softcap) * spec.softcap
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        lowest = torch.finfo(g.dtype).min  # not -inf: a padding query that sees nothing must give numbers
        scores = g.where(visible, scores, lowest)
    y = g.op("Softmax", scores, axis=-1) @ v.unsqueeze(2)
    return y.reshape(0, spec.n_heads, -1, spec.head_dim).transpose(0, 2, 1, 3).reshape(0, 0, -1)


def heads(x: Value, count: int, head_dim: int) -> Value:
    """[B, T, H K] -> [B, H, T, K]"""
    return x.reshape(0, 0, count, head_dim).transpose(0, 2, 1, 3)


def _normalized(b: Builder, spec: config.Attention, name: str, x: Value, as_heads: bool = True) -> Value:
    """Heads of queries or keys through their norm, if there is one; without `as_heads` side by side again."""
    count = spec.n_heads if name.endswith("q_norm") else spec.n_kv_heads
    if spec.qk_norm_over == "projection":
        x = norm(b, spec.qk_norm, name, x)
        return heads(x, count, spec.head_dim) if as_heads else x
    if as_heads:
        return norm(b, spec.qk_norm, name, heads(x, count, spec.head_dim))
    return norm(b, spec.qk_norm, name, x.reshape(0, 0, count, spec.head_dim)).reshape(0, 0, -1)


def _rotated(b: Builder, spec: config.Attention, x: Value, places: Places) -> Value:
    turn = positions.turn(b, spec.rope, spec.head_dim, places.positions, places.lengths)
    return turn.of(x, spec.head_dim)


def _fused(b: Builder, spec, name, x, places: Places, cache: KeyValues, max_positions):
    """One operator from projections to what the heads give. It rotates too, where angles do not hang on a text's length."""
    parts = [f"{name}.{part}_proj" for part in "qkv"]
    widths = [count * spec.head_dim for count in (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)]
    rotates = spec.rope is not None and not rope_scaling.heeds_length(spec.rope)
    query, key, value = linear(b, parts, x), None, None
    if spec.qk_norm is not None or (spec.rope is not None and not rotates):
        query, key, value = query.split(*widths)
        query = _normalized(b, spec, f"{name}.q_norm", query, as_heads=False)
        key = _normalized(b, spec, f"{name}.k_norm", key, as_heads=False)
        if spec.rope is not None and not rotates:
            turned = (heads(part, part_heads, spec.head_dim) for part, part_heads in _counted(spec, query, key))
            query, key = (_rotated(b, spec, part, places).transpose(0, 2, 1, 3).reshape(0, 0, -1) for part in turned)
    cos, sin = positions.tables(b, spec.rope, spec.head_dim, max_positions) if rotates else (None, None)
    types = [x.type] * 3
    y, k, v = b.graph.ops(
        "GroupQueryAttention",
        *(query, key, value, *cache.past, *places.counts(), cos, sin),
        names=[b.graph._fresh("attention"), *cache.names],
        types=types,
        domain=MICROSOFT,
        num_heads=spec.n_heads,
        kv_num_heads=spec.n_kv_heads,
        scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        do_rotary=int(rotates),
        local_window_size=-1 if spec.window is None else spec.window,
        softcap=spec.softcap,
    )
    return linear(b, f"{name}.o_proj", y), (k, v)


def _counted(spec: config.Attention, query: Value, key: Value) -> list[tuple[Value, int]]:
    return [(query, spec.n_heads), (key, spec.n_kv_heads)]
