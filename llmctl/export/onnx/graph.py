"""An ONNX graph under construction."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from llmctl.tensor_file import LazyTensor

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
MICROSOFT = "com.microsoft"


class Value:
    """A tensor of the graph, by name and element type. Numbers beside it in arithmetic take its type."""

    __slots__ = ("graph", "name", "type")

    def __init__(self, graph: Graph, name: str, type_: int):
        self.graph, self.name, self.type = graph, name, type_

    def __add__(self, other):
        return self.graph.op("Add", self, other)

    def __sub__(self, other):
        return self.graph.op("Sub", self, other)

    def __mul__(self, other):
        return self.graph.op("Mul", self, other)

    def __truediv__(self, other):
        return self.graph.op("Div", self, other)

    def __matmul__(self, other):
        return self.graph.op("MatMul", self, other)

    def __neg__(self):
        return self.graph.op("Neg", self)

    def __and__(self, other):
        return self.graph.op("And", self, other)

    def compare(self, kind: str, other) -> Value:
        """`kind` is Less, LessOrEqual, Greater, GreaterOrEqual or Equal."""
        return self.graph.op(kind, self, other, type=BOOL)

    def cast(self, type_: int) -> Value:
        return self if type_ == self.type else self.graph.op("Cast", self, type=type_, to=type_)

    def reshape(self, *dims: int) -> Value:
        """0 keeps the dimension at that place, -1 is what is left."""
        return self.graph.op("Reshape", self, self.graph.ints(*dims))

    def transpose(self, *order: int) -> Value:
        return self.graph.op("Transpose", self, perm=order)

    def unsqueeze(self, *axes: int) -> Value:
        return self.graph.op("Unsqueeze", self, self.graph.ints(*axes))

    def squeeze(self, *axes: int) -> Value:
        return self.graph.op("Squeeze", self, self.graph.ints(*axes))

    def size(self, axis: int) -> Value:
        """The length of one dimension, int64 [1]."""
        return self.graph.op("Shape", self, type=INT64, start=axis, end=axis + 1)

    def split(self, *sizes: int, axis: int = -1) -> list[Value]:
        return self.graph.ops("Split", self, self.graph.ints(*sizes), outputs=len(sizes), axis=axis)

    def sum(self, axis: int, keepdims: bool = True) -> Value:
        return self.graph.op("ReduceSum", self, self.graph.ints(axis), keepdims=int(keepdims))

    def mean(self, axis: int) -> Value:
        return self.graph.op("ReduceMean", self, self.graph.ints(axis), keepdims=1)


class Graph:
    """Nodes, inputs, outputs and stored tensors, whose bytes are made when they are written (`writing`)."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.type = dtype, TYPES[dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.stored: dict[str, LazyTensor] = {}
        self.domains: set[str] = set()
        self._counts: dict[str, int] = {}
        self._made: dict[Hashable, Any] = {}

    def input(self, name: str, type_: int, shape: Sequence[int | str]) -> Value:
        self.inputs.append(onnx.helper.make_tensor_value_info(name, type_, shape))
        return Value(self, name, type_)

    def optional_input(self, name: str, default: LazyTensor, shape: Sequence[int | str]) -> Value:
        """One that is `default` where it is not given."""
        self.inputs.append(onnx.helper.make_tensor_value_info(name, TYPES[default.dtype], shape))
        return self.weight(name, default)

    def output(self, name: str, value: Value, shape: Sequence[int | str]) -> None:
        """Give a value out under this name; one that a node has just made may have been named so already."""
        if value.name != name and self.nodes and self.nodes[-1].output == [value.name]:  # nothing has read it yet
            self.nodes[-1].output[0] = value.name = name
        if value.name != name:
            self._add("Identity", [value.name], [name])
        self.outputs.append(onnx.helper.make_tensor_value_info(name, value.type, shape))

    def op(self, kind: str, *inputs: Any, type: int | None = None, name: str | None = None, **how: Any) -> Value:
        """One node with one output, of the type of its first input if none is said; `name` is that of the output."""
        return self.ops(kind, *inputs, types=None if type is None else [type], names=[name] if name else None, **how)[0]

    def ops(
        self,
        kind: str,
        *inputs: Any,
        outputs: int = 1,
        types: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """One node. An input is a Value, a number (of the type of the first Value), or None where the node has none."""
        main = next(value.type for value in inputs if isinstance(value, Value))
        given = ["" if value is None else self._as_value(value, main).name for value in inputs]
        made = list(names or [self._fresh(kind) for _ in range(outputs)])
        self._add(kind, given, made, domain, **attributes)
        return [Value(self, name, type_) for name, type_ in zip(made, types or [main] * len(made))]

    def constant(self, value: np.ndarray | torch.Tensor) -> Value:
        """A small tensor; equal ones are stored once."""
        tensor = torch.as_tensor(value).contiguous()
        flat = tensor.reshape(-1).view(torch.uint8)
        key = (tensor.dtype, tuple(tensor.shape), bytes(flat.numpy()))
        name = self.once(key, lambda: self._fresh("constant"))
        self.stored[name] = LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)
        return Value(self, name, TYPES[tensor.dtype])

    def ints(self, *values: int) -> Value:
        return self.constant(np.array(values, dtype=np.int64))

    def number(self, value: float, type_: int) -> Value:
        dtype = next(dtype for dtype, known in TYPES.items() if known == type_)
        return self.constant(torch.tensor(value, dtype=dtype))

    def weight(self, name: str, tensor: LazyTensor) -> Value:
        self.stored[name] = tensor
        return Value(self, name, TYPES[tensor.dtype])

    def concat(self, *values: Value, axis: int = -1, name: str | None = None) -> Value:
        return self.op("Concat", *values, axis=axis, name=name)

    def range(self, start: Value | int, end: Value) -> Value:
        """int64, from `start` to in front of `end`, each [1] or a number."""
        first, last = (
            v.squeeze(0) if isinstance(v, Value) else self.constant(np.array(v, dtype=np.int64)) for v in (start, end)
        )
        return self.op("Range", first, last, self.constant(np.array(1, dtype=np.int64)), type=INT64)

    def where(self, condition: Value, yes: Any, no: Any) -> Value:
        type_ = next(value.type for value in (yes, no) if isinstance(value, Value))
        yes, no = self._as_value(yes, type_), self._as_value(no, type_)
        return self.op("Where", condition, yes, no, type=type_)

    def choose(self, condition: Value, yes: Callable[[], list[Value]], no: Callable[[], list[Value]]) -> list[Value]:
        """What `yes()` or `no()` gives, of which one is computed; what they store is stored once."""
        branches, types = {}, []
        for key, build in (("then_branch", yes), ("else_branch", no)):
            outer, self.nodes = self.nodes, []
            results = [self.op("Identity", value) for value in build()]
            types = [value.type for value in results]
            infos = [onnx.helper.make_tensor_value_info(value.name, value.type, None) for value in results]
            branches[key] = onnx.helper.make_graph(self.nodes, self._fresh(key), [], infos)
            self.nodes = outer
        return self.ops("If", condition, outputs=len(types), types=types, **branches)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time for this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _as_value(self, value: Any, type_: int) -> Value:
        return value if isinstance(value, Value) else self.number(value, type_)

    def _add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes) -> None:
        if domain:
            self.domains.add(domain)
        node = onnx.helper.make_node(kind, inputs, outputs, name=self._fresh(f"node_{kind}"), domain=domain)
        node.attribute.extend(
            onnx.helper.make_attribute(key, value) for key, value in attributes.items() if value is not None
        )
        self.nodes.append(node)

    def _fresh(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, -1) + 1
        return f"{kind}_{self._counts[kind]}"
