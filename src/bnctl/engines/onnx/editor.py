"""A copy of an ONNX model, and the few changes that surgery makes to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.engines.onnx.names import value_names
from bnctl.engines.onnx.scopes import fresh_name, opsets
from bnctl.engines.onnx.shapes import IR_VERSION_WITH_DEFAULTS
from bnctl.engines.onnx.translated import Place
from bnctl.plan.parameters import check_range

_PADS_ARE_INPUTS = 11
"""The opset from which Pad takes its numbers as inputs."""


class Editor:
    """Edits a structural copy of a model: tensors that no edit replaces are shared with the original.

    Args:
        original: the model; not changed.
    """

    def __init__(self, original: ir.Model) -> None:
        self.model = original.clone()
        self._twins = dict(zip(original.graph.all_nodes(), self.model.graph.all_nodes(), strict=True))
        self._names = value_names(self.model)
        self._values = {str(v.name): v for node in self._twins.values() for v in node.outputs}

    def value(self, name: str) -> ir.Value:
        """The value that a node of the original computes under this name; behind an appended operator, what that computes."""
        return self._values[name]

    def twin(self, node: ir.Node) -> ir.Node:
        """The copy of a node of the original."""
        return self._twins[node]

    def fresh(self, base: str) -> str:
        """A name that no value has, and that is taken from now on."""
        return fresh_name(base, self._names)

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a value a name; nobody else may have it."""
        self._names.discard(str(value.name))
        self._names.add(name)
        value.name = name

    def write(self, layer: str, place: Place, array: NDArray[np.float64], dtype: ir.DataType) -> None:
        """Let a node read this array instead: an initializer of its own, which takes over the old one's name if nobody else reads that.

        A bias is given per channel.

        Raises:
            OverflowInFoldError: the array does not fit the type.
        """
        node = self.twin(place.node)
        if place.behind:
            array = array.reshape(-1, *[1] * place.behind)
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
        new = self.initializer(layer, base, array, dtype)
        if old is not None:
            _describe(new, old)
        node.replace_input_with(place.index, new)

    def share(self, place: Place, other: Place) -> None:
        """Let a node read what another one reads at its place."""
        assert place.index is not None and other.index is not None
        node = self.twin(place.node)
        old = node.inputs[place.index]
        node.replace_input_with(place.index, self.twin(other.node).inputs[other.index])
        self.prune(old)

    def initializer(self, layer: str, base: str, array: NDArray[np.float64], dtype: ir.DataType) -> ir.Value:
        """A new initializer of the main graph, which is seen from everywhere; ``array`` is cast once, to the given type.

        Raises:
            OverflowInFoldError: the array does not fit the type.
        """
        check_range(layer, array, _largest(dtype))
        return self._register(base, array, dtype)

    def _register(self, base: str, array: NDArray[Any], dtype: ir.DataType) -> ir.Value:
        name = self.fresh(base)
        tensor = ir.Tensor(array.astype(dtype.numpy(), copy=False), dtype=dtype, name=name)
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
        _describe(after, before)
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        added.replace_input_with(0, before)
        _graph_of(node).insert_after(node, added)
        self.rename(before, self.fresh(f"{name}_before_{op_type}"))
        self.rename(after, name)
        self._values[name] = after
        return after

    def append_ones(self, node: ir.Node, rank: int, dtype: ir.DataType) -> None:
        """Let a node of the original see a further channel of ones behind those of its first input."""
        twin = self.twin(node)
        source = twin.inputs[0]
        assert source is not None
        pads = [0] * (2 * rank)
        pads[rank + 1] = 1
        name = f"{twin.outputs[0].name}_ones"
        if opsets(self.model.opset_imports).get("", 0) < _PADS_ARE_INPUTS:
            added = ir.node("Pad", [source], attributes={"pads": pads, "value": 1.0}, num_outputs=1, name=name)
        else:
            sizes = self._register(f"{name}_pads", np.array(pads), ir.DataType.INT64)
            added = ir.node("Pad", [source, sizes, self._register(f"{name}_value", np.ones(()), dtype)], name=name)
        self.rename(added.outputs[0], self.fresh(f"{source.name}_and_ones"))
        _graph_of(twin).insert_before(twin, added)
        twin.replace_input_with(0, added.outputs[0])

    def bypass(self, node: ir.Node, index: int) -> None:
        """Take out a node: its readers read its input number ``index``."""
        source, result = node.inputs[index], node.outputs[0]
        assert source is not None
        graph = _graph_of(node)
        if result.is_graph_output() and source.graph is not graph:  # a body's output is computed in it
            same = ir.node("Identity", [source], name=node.name)
            graph.insert_before(node, same)
            source = same.outputs[0]
            self.rename(source, self.fresh(str(result.name)))
        if result.type is not None:  # an output of the model keeps its declared type
            source.type, source.shape = result.type, result.shape
        _describe(source, result)
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        parameters = [v for v in node.inputs if v is not source]
        self._remove(node)
        for value in parameters:
            self.prune(value)

    def _remove(self, node: ir.Node) -> None:
        _graph_of(node).remove(node, safe=True)
        self._names.difference_update(str(v.name) for v in node.outputs)

    def prune(self, value: ir.Value | None) -> None:
        """Remove a parameter that nobody reads any more, with what only it was computed from."""
        if value is None or value.uses() or value.is_graph_output():
            return
        producer = value.producer()
        if producer is not None and producer.graph is None:  # gone already, with another of its outputs
            return
        if value.is_initializer():
            assert value.graph is not None
            if value.is_graph_input():  # before IR version 4, all initializers are listed there
                value.graph.inputs.remove(value)
            value.graph.initializers.pop(str(value.name))
            self._names.discard(str(value.name))
        elif producer is not None and not any(v.uses() or v.is_graph_output() for v in producer.outputs):
            inputs = dict.fromkeys(producer.inputs)
            self._remove(producer)
            for given in inputs:
                self.prune(given)


def _describe(value: ir.Value, like: ir.Value) -> None:
    """Say of a value what is said of the one in whose place it is; how that was quantised no longer holds."""
    value.doc_string = like.doc_string
    value.metadata_props.clear()
    value.metadata_props.update(like.metadata_props)
    value.meta.pop("quant_parameter_tensor_names", None)
    if value.const_value is not None and like.const_value is not None:
        value.const_value.doc_string = like.const_value.doc_string


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def _largest(dtype: ir.DataType) -> float:
    import ml_dtypes  # numpy does not know bfloat16

    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
