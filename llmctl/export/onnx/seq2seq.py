"""The graphs of an encoder-decoder, under optimum's names: the encoder, the decoder of a first pass, the decoder of those
that follow, and in one file both decoders, of which `use_cache_branch` chooses."""

from __future__ import annotations

from typing import Literal

from llmctl.export.onnx import head
from llmctl.export.onnx.attention import KeyValues
from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.causal import BATCH, KINDS, LENGTH, PAST, TOTAL
from llmctl.export.onnx.graph import BOOL, INT64, Value
from llmctl.export.onnx.masked import places_of
from llmctl.export.onnx.stack import Stack, cross_projections
from llmctl.export.onnx.visibility import Places
from llmctl.models import config

SOURCE = "encoder_sequence_length"
Pass = Literal["first", "next", "either"]


def build_encoder(b: Builder, spec: config.ModelConfig) -> None:
    g = b.graph
    ids, mask = (g.input(name, INT64, [BATCH, SOURCE]) for name in ("input_ids", "attention_mask"))
    x = Stack(b, spec.encoder, "encoder.").run(head.embedded(b, spec, ids), places_of(b, mask))
    g.output("last_hidden_state", x, [BATCH, SOURCE, spec.d_model])


def build_decoder(b: Builder, spec: config.ModelConfig, which: Pass) -> None:
    g = b.graph
    ids = g.input("input_ids", INT64, [BATCH, LENGTH])
    source_mask = g.input("encoder_attention_mask", INT64, [BATCH, SOURCE])
    states = None if which == "next" else g.input("encoder_hidden_states", g.type, [BATCH, SOURCE, spec.d_model])
    past = None if which == "first" else _past(b, spec)
    follows = g.input("use_cache_branch", BOOL, [1]) if which == "either" else None
    before = g.ints(0) if past is None else past[0][0].size(2)
    total = before + ids.size(1)
    queries, keys = g.range(before, total), g.range(0, total)
    places = Places(b, queries, keys, queries.unsqueeze(0))
    cross = [_source_keys(b, spec, layer, states, past, follows) for layer in range(spec.n_layers)]
    caches = [KeyValues(past=None if past is None else entry[:2]) for entry in past or [()] * spec.n_layers]
    stack = Stack(b, spec, "", caches, cross.__getitem__, source_mask)
    x = stack.run(head.embedded(b, spec, ids), places)
    g.output("logits", head.logits(b, spec, x), [BATCH, LENGTH, spec.vocab_size])
    for layer in range(spec.n_layers):
        heads, head_dim = _width(spec)
        for kind, value in zip(KINDS, stack.present[layer]):
            length = LENGTH if past is None else TOTAL
            g.output(f"present.{layer}.decoder.{kind}", value, [BATCH, heads, length, head_dim])
        for kind, value in zip(KINDS, cross[layer] if which != "next" else ()):
            g.output(f"present.{layer}.encoder.{kind}", value, [BATCH, heads, SOURCE, head_dim])


def _past(b: Builder, spec: config.ModelConfig) -> list[tuple[Value, ...]]:
    """Of each layer the decoder's keys and values, and those of the source."""
    heads, head_dim = _width(spec)
    return [
        tuple(
            b.graph.input(f"past_key_values.{layer}.{side}.{kind}", b.graph.type, [BATCH, heads, length, head_dim])
            for side, length in (("decoder", PAST), ("encoder", SOURCE))
            for kind in KINDS
        )
        for layer in range(spec.n_layers)
    ]


def _source_keys(b: Builder, spec, layer: int, states: Value | None, past, follows: Value | None) -> tuple[Value, ...]:
    """A layer's keys and values of the source: projected in the first pass, and from then on those."""

    def project() -> list[Value]:
        return list(cross_projections(b, spec.block(layer).cross_attention, f"layers.{layer}.cross", states))

    if follows is not None:
        return tuple(b.graph.choose(follows, lambda: list(past[layer][2:]), project))
    return tuple(project()) if past is None else past[layer][2:]


def _width(spec: config.ModelConfig) -> tuple[int, int]:
    mixer = spec.block(0).mixer
    return mixer.n_kv_heads, mixer.head_dim
