"""Shapes and element types of the values of an ONNX model, by the shape inference of the onnx package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from bnctl.engines.onnx.scopes import within
from bnctl.engines.onnx.tensors import stored_tensor
from bnctl.graph.affine import Shape

if TYPE_CHECKING:
    import onnx

_SMALL_BYTES = 1024
"""Tensors up to this size keep their values for inference: it needs the targets of reshapes, not the weights."""

IR_VERSION_WITH_DEFAULTS = 4
"""From this version on, an initializer that is also a graph input is a default that a caller may override. Before it, every initializer had to be
listed as an input, and ONNX Runtime treats all of them as constants."""

_ANONYMOUS = {"", "?"}
"""Names that exporters give to sizes that need not be equal (Paddle writes "?" for each)."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a value: its sizes (None where even the rank is unknown), and numpy's name of its element type ("" where unknown)."""

    shape: Shape | None = None
    dtype: str = ""

    @property
    def floating(self) -> bool:
        """An element type of real numbers."""
        return self.dtype.startswith(("float", "bfloat"))


def infer_info(model: ir.Model) -> dict[str, TensorInfo]:
    """Shape and type of each value, by name, as far as they follow from the inputs. Names must be unique over all graphs.

    The shapes that the file declares of its other values may be stale (the batch was 1 when they were written, and the input was changed later).
    So they are set aside, and one is used only where inference does not even find the number of axes, and nothing before it in the graph is in the same case:
    behind an operator that the onnx package does not know, say. The model is not changed and its weights are not copied.
    """
    proto = _skeleton(model)
    declared = _set_aside_shapes(proto.graph)
    for _, node in _nodes(proto.graph):
        for inner in _inner(node):
            declared |= _set_aside_shapes(inner, with_inputs=True)
    while True:
        known = _collected(_inferred(proto).graph)
        found = _first_unknown(proto.graph, known, declared)
        if not found:
            return known
        for graph, info in found:
            entry = next((e for e in (*graph.output, *graph.value_info) if e.name == info.name), None)
            if entry is None:
                graph.value_info.append(info)
            else:
                entry.CopyFrom(info)


def _set_aside_shapes(graph: onnx.GraphProto, *, with_inputs: bool = False) -> dict[str, onnx.ValueInfoProto]:
    """Take the declared shapes from what nodes compute; returns them, by name.

    What comes into a body is computed too, and may have other sizes in each pass of a loop: of its inputs, sizes are dropped for good.
    """
    import onnx

    declared = {}
    computed = {name for node in graph.node for name in node.output}
    for info in (*graph.output, *graph.value_info):
        if info.name in computed and info.type.HasField("tensor_type") and info.type.tensor_type.HasField("shape"):
            declared[info.name] = onnx.ValueInfoProto.FromString(info.SerializeToString())
            info.type.tensor_type.ClearField("shape")
    for info in graph.input if with_inputs else ():
        for dim in info.type.tensor_type.shape.dim:
            dim.Clear()
    return declared


def _nodes(graph: onnx.GraphProto) -> Iterator[tuple[onnx.GraphProto, onnx.NodeProto]]:
    """Every node with its graph, in order of execution; those inside a node come before it."""
    for node in graph.node:
        for inner in _inner(node):
            yield from _nodes(inner)
        yield graph, node


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _first_unknown(
    graph: onnx.GraphProto, known: dict[str, TensorInfo], declared: dict[str, onnx.ValueInfoProto]
) -> list[tuple[onnx.GraphProto, onnx.ValueInfoProto]]:
    """What can be said of values whose shape inference does not find, and would not find if the others in the list were known; each with its graph.

    Of a convolution, that follows from its weight, of a GroupNormalization from its input; of other nodes, it is what the file declares.
    """
    found: list[tuple[onnx.GraphProto, onnx.ValueInfoProto]] = []
    waiting: set[str] = set()
    for around, node in _nodes(graph):
        unknown = [name for name in node.output if name and known.get(name, TensorInfo()).shape is None]
        if waiting.isdisjoint(_reads(node)):
            rule = _OUTPUT.get(node.op_type)
            output = rule(node, known) if rule is not None else None
            infos = (output or declared.get(name) for name in unknown)
            new = [(around, info) for info in infos if info is not None]
            found += new
            if not new:
                continue
        waiting.update(unknown)
    return found


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for inner in _inner(node):
        yield from (value.name for value in inner.output)
        for _, other in _nodes(inner):
            yield from other.input


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # InferenceError, or an error of protobuf's: the model stays usable, with less known
        return proto


def _collected(graph: onnx.GraphProto) -> dict[str, TensorInfo]:
    declared = (*graph.input, *graph.output, *graph.value_info)
    found = {info.name: _info(info.type) for info in declared if info.type.HasField("tensor_type")}
    found |= {t.name: TensorInfo(tuple(t.dims), dtype_name(ir.DataType(t.data_type))) for t in graph.initializer}
    for node in graph.node:
        for inner in _inner(node):
            found |= _collected(inner)
    return found


def _conv_output(node: onnx.NodeProto, known: dict[str, TensorInfo]) -> onnx.ValueInfoProto | None:
    """The number of axes and of channels of a convolution's output follow from its weight, where nothing is known of its input."""
    import onnx

    weight = known.get(node.input[1], TensorInfo())
    if weight.shape is None or len(weight.shape) < 3:
        return None
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    channels = weight.shape[0] if node.op_type == "Conv" else weight.shape[1]
    if not isinstance(channels, int):
        return None
    shape = [None, channels if node.op_type == "Conv" else channels * groups, *[None] * (len(weight.shape) - 2)]
    dtype = ir.DataType.from_numpy(np.dtype(weight.dtype))
    return onnx.helper.make_tensor_value_info(node.output[0], int(dtype), shape)


def _group_norm_output(node: onnx.NodeProto, known: dict[str, TensorInfo]) -> onnx.ValueInfoProto | None:
    """As its input; inference goes through the operator's definition, and loses the sizes there."""
    import onnx

    given = known.get(node.input[0], TensorInfo())
    if given.shape is None or not given.dtype:
        return None
    dtype = ir.DataType.from_numpy(np.dtype(given.dtype))
    return onnx.helper.make_tensor_value_info(node.output[0], int(dtype), given.shape)


_OUTPUT = {"Conv": _conv_output, "ConvTranspose": _conv_output, "GroupNormalization": _group_norm_output}


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its large tensors, and without those that a caller can override: they become inputs, whose shape and type are known."""
    clone = model.clone()
    for graph in within(clone.graph):
        for value in tuple(graph.initializers.values()):
            overridable = value.is_graph_input() and model.ir_version >= IR_VERSION_WITH_DEFAULTS
            if value.const_value is None or value.is_graph_output():
                continue
            if overridable or value.const_value.nbytes > _SMALL_BYTES:
                graph.initializers.pop(str(value.name))
                if not value.is_graph_input():
                    _stand_in(clone, value, value.const_value)
        for node in tuple(graph):
            tensor = stored_tensor(node.outputs[0]) if node.op_type == "Constant" else None
            if tensor is not None and tensor.nbytes > _SMALL_BYTES and not node.outputs[0].is_graph_output():
                _stand_in(clone, node.outputs[0], tensor)
                graph.remove(node, safe=True)
    return ir.to_proto(clone)


def _stand_in(model: ir.Model, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let everybody read an input of the main graph instead: it is seen from subgraphs, too."""
    shape = ir.Shape(tuple(tensor.shape.numpy()))
    replacement = ir.Value(name=value.name, type=ir.TensorType(tensor.dtype), shape=shape)
    value.replace_all_uses_with(replacement)
    model.graph.inputs.append(replacement)


def _info(proto: onnx.TypeProto) -> TensorInfo:
    tensor = proto.tensor_type
    shape = tuple(_size(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return TensorInfo(shape, dtype_name(ir.DataType(tensor.elem_type)))


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None  # -1 is not valid, but written by some exporters
    return dim.dim_param if dim.dim_param not in _ANONYMOUS else None


def dtype_name(dtype: ir.DataType) -> str:
    """Numpy's name of an element type ("float32", "bfloat16")."""
    return "" if dtype == ir.DataType.UNDEFINED else dtype.numpy().name
