"""Block and stack: from token embeddings to hidden states, as `models.transformer` has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from llmctl.export.onnx import positions, recurrent
from llmctl.export.onnx.attention import KeyValues, attend, attention, heads, over_all, sees_both_ways
from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.ffn import ffn
from llmctl.export.onnx.graph import Value
from llmctl.export.onnx.linear import linear
from llmctl.export.onnx.norm import Residual, norm
from llmctl.export.onnx.visibility import Places
from llmctl.models import config

CrossKeys = Callable[[int], tuple[Value, Value]]


@dataclass
class Stack:
    """A stack of the model, whose weights' names begin with `prefix`.

    `caches` are those of the layers that come in (none: KeyValues()); `present` has what goes out. `cross_keys` gives a
    layer's keys and values of the source, `source_mask` int64 [B, S] is 1 at its real tokens.
    """

    b: Builder
    spec: config.ModelConfig
    prefix: str = ""
    caches: list[KeyValues] = field(default_factory=list)
    cross_keys: CrossKeys | None = None
    source_mask: Value | None = None
    present: list[tuple[Value, ...]] = field(default_factory=list)

    def run(self, x: Value, places: Places, types: Value | None = None) -> Value:
        """The last layer's output after the final norm, [B, T, D]."""
        x = norm(self.b, self.spec.embedding_norm, f"{self.prefix}embed_norm", self._with_positions(x, places, types))
        bias = None
        if isinstance(self.spec.positions, config.RelativeBias):
            name = f"{self.prefix}relative_bias"
            bias = positions.relative_bias(self.b, self.spec.positions, name, places.queries, places.keys)
        residual = Residual(self.b, x)
        for layer in range(self.spec.n_layers):
            self._block(layer, residual, places, bias)
        return residual.normed(self.spec.final_norm, f"{self.prefix}norm")

    def _with_positions(self, x: Value, places: Places, types: Value | None) -> Value:
        if isinstance(self.spec.positions, config.LearnedPositions):
            x = x + positions.learned(self.b, self.spec.positions, f"{self.prefix}embed_positions", places.positions)
        if self.spec.token_types:
            table, g = self.b.weight(f"{self.prefix}embed_types.weight"), self.b.graph
            x = x + g.op("Gather", table, g.ints(0) if types is None else types, axis=0)
        return x

    def _block(self, layer: int, residual: Residual, places: Places, bias: Value | None) -> None:
        spec, name = self.spec.block(layer), f"{self.prefix}layers.{layer}"
        self._branch(
            spec, f"{name}.mixer", residual, lambda x: self._mixer(layer, spec, f"{name}.mixer", x, places, bias)
        )
        if spec.cross_attention is not None:
            self._branch(spec, f"{name}.cross", residual, lambda x: self._cross(layer, spec, f"{name}.cross", x))
        if spec.ffn is not None:
            self._branch(spec, f"{name}.ffn", residual, lambda x: ffn(self.b, spec.ffn, f"{name}.ffn", x))

    def _branch(self, spec: config.Block, name: str, residual: Residual, run: Callable[[Value], Value]) -> None:
        before, behind, of_sum = norms(spec)
        y = run(residual.normed(before, f"{name}_norm"))
        residual.add(norm(self.b, behind, f"{name}_output_norm", y))
        residual.replace_by_norm(of_sum, f"{name}_sum_norm")

    def _mixer(self, layer: int, spec: config.Block, name: str, x: Value, places: Places, bias: Value | None) -> Value:
        cache = self.caches[layer] if self.caches else KeyValues()
        if isinstance(spec.mixer, config.Recurrent):
            y, present = recurrent.recurrent(self.b, spec.mixer, name, x, cache, places)
        else:
            limit = self.spec.max_positions
            y, present = attention(self.b, spec.mixer, name, x, places, cache, bias, limit)
        self.present.append(present)
        return y

    def _cross(self, layer: int, spec: config.Block, name: str, x: Value) -> Value:
        mixer = spec.cross_attention
        q, (k, v) = linear(self.b, f"{name}.q_proj", x), self.cross_keys(layer)
        if self.b.fuse and sees_both_ways(mixer):
            return linear(self.b, f"{name}.o_proj", over_all(self.b, mixer, q, k, v, self.source_mask))
        q = heads(q, mixer.n_heads, mixer.head_dim)
        seen = self.b.graph.once("source seen", lambda: self.source_mask.compare("Greater", 0).unsqueeze(1, 2, 3))
        return linear(self.b, f"{name}.o_proj", attend(self.b, mixer, q, k, v, seen, None))


def norms(spec: config.Block) -> tuple[config.Norm | None, ...]:
    """In front of a branch, on its output, and on the sum with the residual."""
    places = {"pre": (0,), "output": (1,), "sandwich": (0, 1), "post": (2,)}[spec.norm_placement]
    return tuple(spec.norm if place in places else None for place in range(3))


def cross_projections(b: Builder, spec: config.Attention, name: str, states: Value) -> tuple[Value, Value]:
    """A layer's keys and values [B, G, S, K] of the source."""
    k, v = (linear(b, f"{name}.{part}_proj", states) for part in "kv")
    return heads(k, spec.n_kv_heads, spec.head_dim), heads(v, spec.n_kv_heads, spec.head_dim)
