"""Norms, and the residual stream that they read."""

from __future__ import annotations

from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import FLOAT, MICROSOFT, Value
from llmctl.models import config


def norm(b: Builder, spec: config.Norm | None, name: str, x: Value) -> Value:
    """Of the last dimension, taken in float32; None is the identity."""
    if spec is None:
        return x
    if spec.kind == "layer":
        weight, bias = b.weight(f"{name}.weight"), b.weight(f"{name}.bias")
        return b.graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=spec.eps)
    # This is the form that onnxruntime knows as an RMSNorm, and runs as one operator.
    wide = x.cast(FLOAT)
    square = b.graph.op("Pow", wide, 2.0)
    root = b.graph.op("Sqrt", square.mean(-1) + spec.eps)
    return (wide / root).cast(x.type) * _gain(b, spec, name)


def _gain(b: Builder, spec: config.Norm, name: str) -> Value:
    shape = b.weights.shapes[f"{name}.weight"]
    return b.graph.weight(
        f"{name}.weight", b.weights.lazy(f"{name}.weight", shape, lambda weight: weight + spec.offset)
    )


class Residual:
    """The stream that branches add to. An addition waits for the norm that follows it, which may be one operator with it."""

    def __init__(self, b: Builder, x: Value):
        self._b, self._x, self._added = b, x, None

    @property
    def value(self) -> Value:
        if self._added is not None:
            self._x, self._added = self._x + self._added, None
        return self._x

    def add(self, y: Value) -> None:
        self._x, self._added = self.value, y

    def normed(self, spec: config.Norm | None, name: str) -> Value:
        """The stream through a norm; the stream itself stays as it is."""
        if spec is None or self._added is None or not self._b.fuse:
            return norm(self._b, spec, name, self.value)
        y, self._x = self._fused(spec, name)
        self._added = None
        return y

    def replace_by_norm(self, spec: config.Norm | None, name: str) -> None:
        """Where a norm stands behind the sum, the stream goes on from it."""
        if spec is not None:
            self._x, self._added = self.normed(spec, name), None

    def _fused(self, spec: config.Norm, name: str) -> tuple[Value, Value]:
        g = self._b.graph
        gain = _gain(self._b, spec, name)
        names = [g._fresh("normed"), "", "", g._fresh("sum")]
        how = {"names": names, "types": [self._x.type] * 4, "domain": MICROSOFT, "epsilon": spec.eps}
        if spec.kind == "rms":
            made = g.ops("SkipSimplifiedLayerNormalization", self._x, self._added, gain, **how)
        else:
            bias = self._b.weight(f"{name}.bias")
            made = g.ops("SkipLayerNormalization", self._x, self._added, gain, bias, **how)
        return made[0], made[3]
