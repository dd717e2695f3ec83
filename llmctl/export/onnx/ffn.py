"""Feed-forward layers."""

from __future__ import annotations

from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import INT64, Value
from llmctl.export.onnx.linear import linear
from llmctl.models import config


def ffn(b: Builder, spec: config.Mlp | config.GatedMlp | config.Moe, name: str, x: Value) -> Value:
    match spec:
        case config.Mlp():
            return linear(b, f"{name}.down_proj", activation(spec.activation, linear(b, f"{name}.up_proj", x)))
        case config.GatedMlp():
            return _gated(b, spec, name, x)
        case config.Moe():
            return _experts(b, spec, name, x)
    raise NotImplementedError(type(spec))


def activation(kind: config.Activation, x: Value) -> Value:
    match kind:
        case "silu":
            return x * x.graph.op("Sigmoid", x)
        case "relu":
            return x.graph.op("Relu", x)
        case "gelu" | "gelu_tanh":
            return x.graph.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")
    raise NotImplementedError(kind)


def _gated(b: Builder, spec: config.GatedMlp, name: str, x: Value) -> Value:
    gate, up = (linear(b, f"{name}.{part}_proj", x) for part in ("gate", "up"))
    return linear(b, f"{name}.down_proj", activation(spec.activation, gate) * up)


def _experts(b: Builder, spec: config.Moe, name: str, x: Value) -> Value:
    """Each expert takes the rows of its tokens, which may be none, and adds what it makes of them."""
    g = b.graph
    width = b.weights.shapes[f"{name}.router.weight"][1]
    rows = x.reshape(-1, width)
    scores = linear(Builder(g, b.weights), f"{name}.router", rows).cast(1)
    chances = g.op("Softmax", scores, axis=-1)
    weights, chosen = g.ops("TopK", chances, g.ints(spec.top_k), outputs=2, types=[1, INT64], axis=-1)
    if spec.normalize:
        weights = weights / weights.sum(-1)
    total = rows * 0.0
    for number in range(spec.n_experts):
        is_chosen = chosen.compare("Equal", number)
        # [M] rows, and [M] which of their choices it was
        row, choice = g.op("NonZero", is_chosen, type=INT64).split(1, 1, axis=0)
        places = g.concat(row, choice, axis=0).transpose(1, 0)
        share = g.op("GatherND", weights, places).unsqueeze(1).cast(x.type)
        some = g.op("Gather", rows, row.squeeze(0), axis=0)
        made = _gated(b, spec.expert, f"{name}.experts.{number}", some) * share
        total = g.op("ScatterND", total, row.transpose(1, 0), made, reduction="add")
    shape = g.concat(x.size(0), x.size(1), g.ints(width), axis=0)
    return g.op("Reshape", total, shape)
