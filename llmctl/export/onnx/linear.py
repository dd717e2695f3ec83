"""Linear layers, one or several that read the same input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from llmctl.export.onnx.builder import Builder
from llmctl.export.onnx.graph import MICROSOFT, Value
from llmctl.export.onnx.packed import packed_groups
from llmctl.export.onnx.quantization import Groups
from llmctl.run_onnx.adapters import input_names
from llmctl.tensor_file import LazyTensor

FEW_BITS = "MatMulNBits"
FAST = 4
"""onnxruntime's accuracy_level that multiplies whole numbers of 8 bits."""


def linear(b: Builder, names: str | Sequence[str], x: Value) -> Value:
    """x [..., K] -> [..., N] through the module of that name, or through several whose outputs stand side by side."""
    names = [names] if isinstance(names, str) else list(names)
    if b.adapted.intersection(names):
        parts = [_adapted(b, name, x) if name in b.adapted else linear(b, name, x) for name in names]
        return parts[0] if len(parts) == 1 else b.graph.concat(*parts)
    weights = [f"{name}.weight" for name in names]
    n_out, n_in = sum(b.weights.shapes[name][0] for name in weights), b.weights.shapes[weights[0]][1]
    bias = None
    if any(f"{name}.bias" in b.weights for name in names):
        bias = b.graph.weight("+".join(f"{name}.bias" for name in names), _biases(b, names, n_out))
    if (groups := packed_groups(b.weights, weights)) is not None:
        return in_groups(b, "+".join(weights), groups, x, bias)
    if len(weights) > 1 and any(b.weights.packed(name) is not None for name in weights):
        return b.graph.concat(*(linear(b, name, x) for name in names))
    tensor_NK = b.weights.lazy(weights, (n_out, n_in), lambda *parts: torch.cat(parts))
    return product(b, "+".join(weights), tensor_NK, x, bias)


def _adapted(b: Builder, name: str, x: Value) -> Value:
    """With x lora_A lora_B added, which are inputs (`run_onnx.adapters`); without them they have no columns and no rows."""
    g, rank = b.graph, f"{name}.rank"
    n_out, n_in = b.weights.shapes[f"{name}.weight"]
    low = x
    for each, shape in zip(input_names(name), ([n_in, 0], [0, n_out])):
        none = LazyTensor(tuple(shape), g.dtype, lambda shape=shape: torch.zeros(shape, dtype=g.dtype))
        low = low @ g.optional_input(each, none, [size or rank for size in shape])
    return linear(dataclasses.replace(b, adapted=frozenset()), name, x) + low


def product(b: Builder, name: str, tensor_NK: LazyTensor, x: Value, bias: Value | None = None) -> Value:
    """x weight^T + bias, with weights of 4 or 8 bits where the model is to have them."""
    if b.quantization is not None:
        return in_groups(b, name, b.quantization.of(tensor_NK), x, bias)
    n_out, n_in = tensor_NK.shape
    # MatMul takes the matrix the other way round; two of the tensor are in memory while it is turned.
    turned = LazyTensor((n_in, n_out), tensor_NK.dtype, lambda: tensor_NK.load().mT.contiguous())
    y = x @ b.graph.weight(name, turned)
    return y if bias is None else y + bias


def in_groups(b: Builder, name: str, groups: Groups, x: Value, bias: Value | None = None) -> Value:
    """The same with weights of 4 or 8 bits, for which onnxruntime rounds x to 8 bits too."""
    g, (n_out, n_in) = b.graph, groups.shape
    if groups.columns_K is not None:
        x = g.op("Gather", x, g.constant(groups.columns_K.long()), axis=-1)
    # The scales first: they and the codes are made in one pass.
    scales, codes = g.weight(f"{name}.scales", groups.scales), g.weight(f"{name}.codes", groups.codes)
    zeros = None if groups.zeros is None else g.weight(f"{name}.zeros", groups.zeros)
    how = {"K": n_in, "N": n_out, "bits": groups.bits, "block_size": groups.group_size, "accuracy_level": FAST}
    inputs = [x, codes, scales, zeros, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    return g.op(FEW_BITS, *inputs, domain=MICROSOFT, **how)


def _biases(b: Builder, names: Sequence[str], n_out: int) -> LazyTensor:
    """Side by side; a module without one has zeros."""

    def load() -> torch.Tensor:
        sizes = [b.weights.shapes[f"{name}.weight"][0] for name in names]
        parts = (
            b.weights.get(f"{name}.bias") if f"{name}.bias" in b.weights else torch.zeros(size)
            for name, size in zip(names, sizes)
        )
        return torch.cat(list(parts)).to(b.weights.dtype)

    return LazyTensor((n_out,), b.weights.dtype, load)
