"""What must hold of an ONNX model before anything is done with it.

ONNX Runtime and onnx.checker see less, or see it later: a runtime sorts the nodes of a file that lists them in any order, and nobody but the operator itself
looks at the shapes of its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from bnctl.errors import ModelError

if TYPE_CHECKING:
    import onnx
    import onnx_ir


def refuse_what_is_not_kept(proto: onnx.ModelProto, name: str) -> None:
    """Refuse what onnx-ir would drop without a word: sparse tensors, and how a model is trained.

    Raises:
        ModelError: naming it.
    """
    for graph in (*_graphs(proto.graph), *(inner for function in proto.functions for inner in _inner_graphs(function))):
        sparse = [f"initializer {tensor.values.name or '(unnamed)'}" for tensor in graph.sparse_initializer]
        sparse += [
            f"the constant {node.output[0]}"
            for node in graph.node
            for a in node.attribute
            if a.HasField("sparse_tensor")
        ]
        if sparse:
            raise ModelError(
                f"{name}: {sparse[0]} is sparse, and bnctl reads dense ones only",
                hint="write it as a dense tensor (an entry of graph.initializer), or export the model again without sparse weights",
            )
    if proto.training_info:
        raise ModelError(
            f"{name} holds training_info, which would not fit the model after surgery",
            hint="take it out: model = onnx.load(...); del model.training_info[:]; onnx.save(model, ...)",
        )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those inside its nodes, at any depth."""
    yield graph
    yield from _inner_graphs(graph)


def _inner_graphs(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def make_sound(model: onnx_ir.Model, name: str) -> None:
    """Sort the nodes of graphs that are in no order, in place, and refuse a model that cannot be run in any.

    Raises:
        ModelError: a node reads what nobody computes, or itself; has more or fewer inputs than its operator takes; or the parameters of a BatchNormalization
            have different shapes.
    """
    from bnctl.engines.onnx.scopes import opsets, within

    versions = opsets(model.opset_imports)
    for top in (model.graph, *(function.graph for function in model.functions.values())):
        graphs = list(within(top))
        for graph in graphs:
            for node in graph:
                if fault := _fault(node, versions):
                    called = f"{node.op_type} {node.name}" if node.name else f"a {node.op_type}"
                    raise ModelError(f"{name}: {called} {fault}", hint="see what onnx.checker says")
        if not all(map(_is_sorted, graphs)):
            try:
                top.sort()
            except ValueError as error:
                raise ModelError(
                    f"{name}: its nodes form a circle, and none can be run first", hint="see what onnx.checker says"
                ) from error


def _fault(node: onnx_ir.Node, versions: dict[str, int]) -> str | None:
    for value in node.inputs:
        if value is not None and value.producer() is None and not (value.is_graph_input() or value.is_initializer()):
            return f"reads {value.name}, which nobody computes"
    inputs = len(node.inputs)
    least, most = _arity(node.op_type, versions.get(node.domain, 0), node.domain)
    if not least <= inputs <= most:
        return f"has {inputs} inputs, and takes {least if inputs < least else most}"
    if node.op_type == "BatchNormalization" and node.domain == "":
        tensors: list[Any] = [value.const_value for value in node.inputs[1:5] if value is not None]
        shapes = {tuple(t.shape.numpy()) for t in tensors if t is not None}
        if len(shapes) > 1:
            return f"has parameters of different shapes: {', '.join(map(str, sorted(shapes)))}"
    return None


@cache
def _arity(op_type: str, version: int, domain: str) -> tuple[int, int]:
    """The least and the largest number of inputs of an operator; of one that the onnx package does not know, any."""
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, max(version, 1), domain)
    except onnx.defs.SchemaError:
        return 0, 2**31
    return schema.min_input, schema.max_input


def _is_sorted(graph: onnx_ir.Graph) -> bool:
    from bnctl.engines.onnx.scopes import captured, subgraphs

    done: set[onnx_ir.Node] = set()
    for node in graph:
        reads = (*node.inputs, *(v for body in subgraphs(node) for v in captured(body)))
        makers = (value.producer() for value in reads if value is not None)
        if any(maker is not None and maker.graph is graph and maker not in done for maker in makers):
            return False
        done.add(node)
    return True
