"""Layers of an LSTM or a GRU, as ONNX's own operators."""

from __future__ import annotations

import torch

from llmctl.export.onnx.attention import KeyValues
from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import INT32, Value
from llmctl.export.onnx.visibility import Places
from llmctl.models import config_recurrent

_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
"""torch's gates (input, forget, cell, output; reset, update, new) in the order of ONNX (i, o, f, c; z, r, h)."""


def recurrent(
    b: Builder, spec: config_recurrent.Recurrent, name: str, x: Value, cache: KeyValues, places: Places
) -> tuple[Value, tuple[Value, ...]]:
    """(output [B, T, D], states [B, D] behind each row's last real token)."""
    g = b.graph
    weights = [_gates(b, spec, f"{name}.weight_{kind}", ("weight",)) for kind in ("ih", "hh")]
    bias = _gates(b, spec, f"{name}.bias_ih", ("bias", f"{name}.bias_hh"))
    states = [state.unsqueeze(0) for state in cache.past]
    lengths = g.once("row lengths", lambda: places.new_lengths.cast(INT32))
    how = {"hidden_size": spec.d_model} | ({"linear_before_reset": 1} if spec.cell == "gru" else {})
    inputs = (x.transpose(1, 0, 2), *weights, bias, lengths, *states)
    y, *after = g.ops(spec.cell.upper(), *inputs, outputs=1 + len(states), **how)
    return y.squeeze(1).transpose(1, 0, 2), tuple(state.squeeze(0) for state in after)


def _gates(b: Builder, spec: config_recurrent.Recurrent, name: str, kind: tuple[str, ...]) -> Value:
    """[1, gates * D, ...] in ONNX's order; biases of both products stand behind each other."""

    def ordered(*parts: torch.Tensor) -> torch.Tensor:
        made = [torch.cat([part.chunk(spec.n_gates)[i] for i in _ORDER[spec.cell]]) for part in parts]
        return torch.cat(made).unsqueeze(0)

    names = [name, *kind[1:]]
    first = b.weights.shapes[name]
    shape = (1, first[0] * len(names), *first[1:])
    return b.graph.weight(name, b.weights.lazy(names, shape, ordered))
