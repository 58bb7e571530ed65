"""A copy of an ONNX model, and the few changes that surgery makes to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.engines.onnx.constants import IR_VERSION_WITH_DEFAULTS
from bnctl.engines.onnx.names import value_names
from bnctl.engines.onnx.translated import Place
from bnctl.plan.parameters import check_range


class Editor:
    """Edits a structural copy of a model: tensors that no edit replaces are shared with the original.

    Args:
        original: the model; not changed.
    """

    def __init__(self, original: ir.Model) -> None:
        self.model = original.clone()
        self._twins = dict(zip(original.graph, self.model.graph, strict=True))
        self._names = value_names(self.model)
        self._values = {str(v.name): v for node in self.model.graph for v in node.outputs}

    def value(self, name: str) -> ir.Value:
        """The value that a node of the original computes under this name; behind an appended operator, what that computes."""
        return self._values[name]

    def twin(self, node: ir.Node) -> ir.Node:
        """The copy of a node of the original."""
        return self._twins[node]

    def fresh(self, base: str) -> str:
        """A name that no value has, and that is taken from now on."""
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a value a name; nobody else may have it."""
        self._names.discard(str(value.name))
        self._names.add(name)
        value.name = name

    def write(self, layer: str, place: Place, array: NDArray[np.float64], dtype: ir.DataType) -> None:
        """Let a node read this array instead: an initializer of its own, which takes over the old one's name if nobody else reads that.

        Raises:
            OverflowInFoldError: the array does not fit the type.
        """
        node = self.twin(place.node)
        if place.index is None:
            output = node.outputs[0]
            self.append(node, "Add", (self.initializer(layer, f"{output.name}_bias", array, dtype),))
            return
        if place.index >= len(node.inputs):
            node.resize_inputs(place.index + 1)
        old = node.inputs[place.index]
        node.replace_input_with(place.index, None)
        self.prune(old)
        base = str(old.name) if old is not None else f"{node.outputs[0].name}_bias"
        node.replace_input_with(place.index, self.initializer(layer, base, array, dtype))

    def initializer(self, layer: str, base: str, array: NDArray[np.float64], dtype: ir.DataType) -> ir.Value:
        """A new initializer; ``array`` is cast once, to the given type.

        Raises:
            OverflowInFoldError: the array does not fit the type.
        """
        check_range(layer, array, _largest(dtype))
        name = self.fresh(base)
        tensor = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.model.graph.register_initializer(value)
        if self.model.ir_version < IR_VERSION_WITH_DEFAULTS:
            self.model.graph.inputs.append(value)
        return value

    def append(
        self, node: ir.Node, op_type: str, parameters: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """Put an operator behind a node: everybody who read the node's first output reads the operator's, under the same name."""
        before = node.outputs[0]
        name = str(before.name)
        added = ir.node(
            op_type,
            [before, *parameters],
            attributes=dict(attributes or {}),
            num_outputs=1,
            name=f"{node.name or name}_{op_type}",
        )
        after = added.outputs[0]
        after.shape, after.type = before.shape, before.type
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        added.replace_input_with(0, before)
        self.model.graph.insert_after(node, added)
        self.rename(before, self.fresh(f"{name}_before_{op_type}"))
        self.rename(after, name)
        self._values[name] = after
        return after

    def bypass(self, node: ir.Node, index: int) -> None:
        """Take out a node: its readers read its input number ``index``."""
        source, result = node.inputs[index], node.outputs[0]
        assert source is not None
        if result.type is not None:  # an output of the model keeps its declared type
            source.type, source.shape = result.type, result.shape
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        self._remove(node)

    def _remove(self, node: ir.Node) -> None:
        inputs = tuple(node.inputs)
        self.model.graph.remove(node, safe=True)
        self._names.difference_update(str(v.name) for v in node.outputs)
        for value in inputs:
            self.prune(value)

    def prune(self, value: ir.Value | None) -> None:
        """Remove a parameter that nobody reads any more, with what only it was computed from."""
        if value is None or value.uses() or value.is_graph_output():
            return
        graph = self.model.graph
        producer = value.producer()
        if value.is_initializer():
            if value.is_graph_input():  # before IR version 4, all initializers are listed there
                graph.inputs.remove(value)
            graph.initializers.pop(str(value.name))
            self._names.discard(str(value.name))
        elif (
            producer is not None
            and producer.graph is graph
            and not any(v.uses() or v.is_graph_output() for v in producer.outputs)
        ):
            self._remove(producer)


def _largest(dtype: ir.DataType) -> float:
    import ml_dtypes  # numpy does not know bfloat16

    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
