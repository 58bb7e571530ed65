"""What in an ONNX graph does not depend on the inputs: initializers, Constant nodes, and what is computed from those alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.codes import Obstacle
from bnctl.engines.onnx.scopes import opsets, subgraphs
from bnctl.engines.onnx.shapes import IR_VERSION_WITH_DEFAULTS, TensorInfo
from bnctl.engines.onnx.tensors import stored_tensor

_EVALUATED = frozenset(
    {
        *("Identity", "Cast", "ConstantOfShape", "Expand", "Range"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Split", "Slice", "Gather"),
        *("Abs", "Neg", "Reciprocal", "Sqrt", "Exp", "Pow", "Add", "Sub", "Mul", "Div", "Sum", "Max", "Min"),
        *("ReduceL2", "ReduceMean", "ReduceSum"),
    }
)
"""Operators without randomness and subgraphs that exporters put on parameters. DequantizeLinear is not one: folding would leave the grid."""

_RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


class Constants:
    """The constant values of the main graph and of those inside its nodes, evaluated when asked for; what is computed is kept.

    Args:
        model: the model; not changed.
        info: shapes and types by value name.
    """

    def __init__(self, model: ir.Model, info: Mapping[str, TensorInfo]) -> None:
        self._info = info
        self._opsets = opsets(model.opset_imports)
        self._arrays: dict[ir.Value, NDArray[Any] | None] = {}
        defaults = model.ir_version >= IR_VERSION_WITH_DEFAULTS
        self._overridable = {v for v in model.graph.inputs if defaults and v.is_initializer()}
        self._known = {v for v in model.graph.initializers.values() if v not in self._overridable}
        self._add_graph(model.graph)

    def _add_graph(self, graph: ir.Graph) -> None:
        for node in graph:
            if self._is_constant(node):
                self._known.update(node.outputs)
            for inner in subgraphs(node):
                self._known.update(v for v in inner.initializers.values() if not v.is_graph_input())
                self._add_graph(inner)

    def __contains__(self, value: ir.Value | None) -> bool:
        return value in self._known

    def _is_constant(self, node: ir.Node) -> bool:
        if node.domain != "":
            return False
        if node.op_type == "Constant":
            return stored_tensor(node.outputs[0]) is not None
        return (
            node.op_type in _EVALUATED and bool(node.inputs) and all(v is None or v in self._known for v in node.inputs)
        )

    def tensor_shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """Shape of a constant, without reading it where that can be avoided; None where the value is not constant and its shape not known."""
        if value in self:
            stored = stored_tensor(value)
            if stored is not None:
                return tuple(stored.shape.numpy())
        shape = self._static_shape(value)
        if shape is not None:
            return shape
        array = self.array(value)
        return None if array is None else array.shape

    def _static_shape(self, value: ir.Value) -> tuple[int, ...] | None:
        shape = self._info.get(str(value.name), TensorInfo()).shape
        sizes = tuple(n for n in shape or () if isinstance(n, int))
        return sizes if shape is not None and len(sizes) == len(shape) else None

    def array(self, value: ir.Value | None, limit: int | None = None) -> NDArray[Any] | None:
        """The value of a constant; None for what is not constant, cannot be evaluated or has more elements than the limit."""
        if value is None or value not in self:
            return None
        if limit is not None:
            shape = self.tensor_shape(value)
            if shape is None or math.prod(shape) > limit:
                return None
        stored = stored_tensor(value)
        if stored is not None:  # not kept: the weights of a model are read once each
            # A copy of what lies in another file: a view would keep the file mapped, and onnx-ir could not write the model.
            return np.array(stored.numpy()) if isinstance(stored, ir.ExternalTensor) else stored.numpy()
        if value not in self._arrays:
            self._evaluate(value)
        return self._arrays[value]

    def _evaluate(self, value: ir.Value) -> None:
        node = value.producer()
        assert node is not None
        shape = self._static_shape(value)
        first = node.inputs[0]
        if node.op_type in _RESHAPES and shape is not None:  # (onnx.reference 1.23 fails on Unsqueeze before opset 13)
            array = self.array(first)
            self._arrays[value] = None if array is None else array.reshape(shape)
            return
        inputs = {str(v.name): self.array(v) for v in node.inputs if v is not None}
        computed = None if any(a is None for a in inputs.values()) else _run(node, inputs, self._opsets)
        for i, output in enumerate(node.outputs):
            self._arrays[output] = None if computed is None else np.asarray(computed[i])

    def tie(self, value: ir.Value) -> tuple[str, int]:
        """The stored array that a computed one is another form of, where others read it, too, and how many do; else an empty name."""
        if value not in self or stored_tensor(value) is not None:
            return "", 0
        shape, behind = self.tensor_shape(value), _origins(value)
        for origin in behind:
            stored = origin.const_value if origin.is_initializer() else None
            if stored is None or not stored.dtype.is_floating_point() or stored.size != math.prod(shape or ()):
                continue
            others = sum(1 for use in origin.uses() if behind.isdisjoint(use.node.outputs)) + origin.is_graph_output()
            if others:
                return str(origin.name), others
        return "", 0

    def obstacle(self, value: ir.Value) -> Obstacle | None:
        """Why the array behind a value cannot be replaced by another; None where it can."""
        name = str(value.name)
        if value in self:
            info = self._info.get(name, TensorInfo())
            stored = stored_tensor(value)
            floating = stored.dtype.is_floating_point() if stored is not None else info.floating
            return None if floating else Obstacle("BN111", f"{name} does not hold floating-point numbers")
        origins = _origins(value)
        overridable = sorted(str(v.name) for v in origins & self._overridable)
        if overridable:
            return Obstacle(
                "BN112",
                f"{', '.join(overridable)} can be overridden by the caller: it is an input of the graph with a default",
            )
        if any((node := v.producer()) is not None and node.op_type == "DequantizeLinear" for v in origins):
            return Obstacle("BN111", f"{name} is dequantised in every run")
        return Obstacle("BN108", f"{name} is computed in every run")


def _origins(value: ir.Value) -> set[ir.Value]:
    """A value and all that it is computed from."""
    found = {value}
    todo = [value]
    while todo:
        node = todo.pop().producer()
        new = {v for v in (node.inputs if node is not None else ()) if v is not None} - found
        found |= new
        todo += new
    return found


def _run(node: ir.Node, inputs: Mapping[str, Any], opsets: dict[str, int]) -> list[Any] | None:
    from onnx.reference import ReferenceEvaluator

    try:
        results = ReferenceEvaluator(ir.to_proto(node), opsets=opsets).run(None, dict(inputs))
    except Exception:  # whatever the reference implementation cannot do is not a constant for us
        return None
    return list(results)
