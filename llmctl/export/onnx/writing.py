"""A graph to a file: weights one at a time, inside the file or beside it.

A model in one file is a protobuf message, whose parts may be written one behind the other once their lengths are known:
so that no weights are in memory but those being written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from llmctl.export.onnx.graph import TYPES, Graph
from llmctl.tensor_file import LazyTensor, bytes_of

INLINE_BYTES = 1024
"""Tensors up to this size stand in the graph always: shapes and scalars, which a runtime wants to know early."""
ALIGNMENT = 4096
"""Of tensors in a data file, so that each can be mapped."""
LARGEST_MESSAGE = 2**31 - 1
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers of ModelProto, GraphProto and TensorProto in onnx.proto."""
IR_VERSION = 10


def weight_bytes(graph: Graph) -> int:
    return sum(tensor.nbytes for tensor in graph.stored.values())


def write(graph: Graph, path: Path, opset: int, metadata: Mapping[str, str], external_above: int) -> None:
    """Write `path`, and beside it `path`.data where the weights have more than `external_above` bytes."""
    nodes, used = _needed(graph)
    stored = {name: tensor for name, tensor in graph.stored.items() if name in used}
    external: dict[str, LazyTensor] = {}
    if sum(tensor.nbytes for tensor in stored.values()) > min(external_above, LARGEST_MESSAGE - 2**24):
        external = {name: tensor for name, tensor in stored.items() if tensor.nbytes > INLINE_BYTES}
    message = onnx.helper.make_graph(nodes, "main_graph", graph.inputs, graph.outputs)
    if external:
        message.initializer.extend(_write_data(path.with_name(f"{path.name}.data"), external))
    opsets = [onnx.helper.make_opsetid("", opset), *(onnx.helper.make_opsetid(name, 1) for name in graph.domains)]
    model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="llmctl", opset_import=opsets)
    onnx.helper.set_model_props(model, dict(metadata))
    _write_model(path, model, message, {name: tensor for name, tensor in stored.items() if name not in external})


def _needed(graph: Graph) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that outputs hang on, and the names of all that these read."""
    used, kept = {place.name for place in graph.outputs}, []
    for node in reversed(graph.nodes):
        if used.intersection(node.output):
            kept.append(node)
            used.update(name for each in _all_nodes([node]) for name in each.input)
    return kept[::-1], used


def _all_nodes(nodes) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g.node)


def _write_data(path: Path, tensors: Mapping[str, LazyTensor]) -> Iterator[TensorProto]:
    with open(path, "wb") as file:
        for name, tensor in tensors.items():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            header = _header(name, tensor)
            header.data_location = TensorProto.EXTERNAL
            place = {"location": path.name, "offset": str(file.tell()), "length": str(tensor.nbytes)}
            header.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items()
            )
            file.write(bytes_of(name, tensor))
            yield header


def _write_model(path: Path, model: onnx.ModelProto, graph: onnx.GraphProto, tensors: Mapping[str, LazyTensor]) -> None:
    headers = {name: _header(name, tensor).SerializeToString() for name, tensor in tensors.items()}
    heads = {name: _field(_RAW_DATA, tensor.nbytes) for name, tensor in tensors.items()}
    sizes = {name: len(headers[name]) + len(heads[name]) + tensor.nbytes for name, tensor in tensors.items()}
    body = graph.SerializeToString()
    total = len(body) + sum(len(_field(_INITIALIZER, size)) + size for size in sizes.values())
    with open(path, "wb") as file:
        file.write(model.SerializeToString() + _field(_GRAPH, total) + body)
        for name, tensor in tensors.items():
            file.write(_field(_INITIALIZER, sizes[name]) + headers[name] + heads[name])
            file.write(bytes_of(name, tensor))


def _header(name: str, tensor: LazyTensor) -> TensorProto:
    return TensorProto(name=name, dims=tensor.shape, data_type=TYPES[tensor.dtype])


def _field(number: int, length: int) -> bytes:
    """What stands in front of a field of so many bytes: its number and kind, and the length as a varint."""
    out = bytearray([number << 3 | 2])
    while length >= 0x80:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*out, length])
