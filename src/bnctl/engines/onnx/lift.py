"""From an ONNX model to the normalised graph.

Operators are translated by rules (:mod:`~bnctl.engines.onnx.linear`, :mod:`~bnctl.engines.onnx.elementwise`, :mod:`~bnctl.engines.onnx.movement`); this file
resolves values, parameters and names around them, and sees to it that no rule can overlook a reader: a node whose translation leaves out an output that
is read is opaque.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from bnctl.codes import Obstacle
from bnctl.engines.onnx import elementwise, linear, movement
from bnctl.engines.onnx.constants import Constants
from bnctl.engines.onnx.names import layer_names
from bnctl.engines.onnx.shapes import TensorInfo, infer_info
from bnctl.engines.onnx.statistics import Statistics
from bnctl.engines.onnx.translated import Place, Rule, Scope, Translated
from bnctl.errors import ModelError
from bnctl.graph import ops
from bnctl.graph.graph import Graph, Node, Slot, Value

OLDEST_OPSET = 7
"""Before it, arithmetic broadcast by an attribute and BatchNormalization had a test mode. ONNX Runtime does not promise to run it either."""

_RULES: dict[str, Rule] = linear.RULES | elementwise.RULES | movement.RULES
_BATCH_NORM = "BatchNormalization"


@dataclass(frozen=True, eq=False)
class Lifted:
    """The graph of an ONNX model, and the way back.

    Args:
        model: as it came; nobody changes it.
        graph: the normalised graph. Its values have the names of the native ones.
        natives: the native nodes of each node, in order: a MatMul and the Add of its bias are one node.
        places: where each slot's parameter is read.
        constants: the values of parameters.
        info: shapes and types by value name.
    """

    model: ir.Model
    graph: Graph
    natives: dict[int, tuple[ir.Node, ...]]
    places: dict[str, Place]
    constants: Constants
    info: Mapping[str, TensorInfo]

    def statistics(self, node: Node) -> Statistics | None:
        """Parameters of a BatchNormalization; None for other nodes and where a parameter is not constant."""
        native = self.natives[node.id][0]
        return Statistics.read(native, self.constants) if native.op_type == _BATCH_NORM else None


def lift(model: ir.Model) -> Lifted:
    """Translate a model. It is not changed.

    Subgraphs and local functions are not entered: a BatchNormalization inside is a site that is left (BN120), and a value that a subgraph reads is read by
    the node that holds it.

    Raises:
        ModelError: the opset is older than 7.
    """
    opset = model.opset_imports.get("", OLDEST_OPSET)
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"{model.graph.name or 'the model'} uses opset {opset}, and the oldest that bnctl reads is {OLDEST_OPSET}",
            hint="convert it with onnx.version_converter.convert_version(model, 13)",
        )
    info = infer_info(model)
    return _Lifter(model, Scope(opset, info, Constants(model, info))).lift()


class _Lifter:
    def __init__(self, model: ir.Model, scope: Scope) -> None:
        self.model = model
        self.scope = scope
        self.numbers: dict[ir.Value, int] = {}
        self.places: dict[str, Place] = {}

    def lift(self) -> Lifted:
        graph = self.model.graph
        for value in graph.inputs:
            self._number(value)
        data_nodes = [node for node in graph if not self._is_constant(node)]
        hidden = tuple(_hidden_batch_norms(self.model))
        names = layer_names((*data_nodes, *hidden))
        nodes: list[Node] = []
        natives: dict[int, tuple[ir.Node, ...]] = {}
        spanned: set[ir.Node] = set()
        for native in data_nodes:
            if native in spanned:
                continue
            translated = self._translate(native)
            number = len(nodes)
            natives[number] = (native,) if translated.last is None else (native, translated.last)
            spanned.update(natives[number])
            nodes.append(self._node(number, names[native], translated, natives[number]))
        for native in hidden:
            natives[len(nodes)] = (native,)
            op = ops.Norm(_BATCH_NORM, Obstacle("BN120", "it is inside a subgraph or a local function"))
            nodes.append(Node(len(nodes), op, names[native], (), ()))
        return Lifted(self.model, self._graph(nodes), natives, self.places, self.scope.constants, self.scope.info)

    def _is_constant(self, node: ir.Node) -> bool:
        return bool(node.outputs) and all(v in self.scope.constants for v in node.outputs)

    def _translate(self, node: ir.Node) -> Translated:
        """The operator of a node: opaque where no rule knows it, or where the rule leaves out an output that is read."""
        rule = _RULES.get(node.op_type)
        known = node.domain == "" and rule is not None and node.op_identifier() not in self.model.functions
        translated = rule(node, self.scope) if known and rule is not None else None
        if translated is not None and translated.reads is None and _primary(node, translated) in self.scope.constants:
            translated = None
        if translated is not None:
            last = translated.last or node
            made = translated.outputs or last.outputs[:1]
            if not any(_is_read(v) for v in last.outputs if v not in made):
                return replace(translated, outputs=tuple(made))
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        return Translated(ops.Opaque(kind), outputs=tuple(v for v in node.outputs if v.name))

    def _node(self, number: int, name: str, translated: Translated, natives: tuple[ir.Node, ...]) -> Node:
        reads = translated.reads
        if reads is None:
            between = {v for native in natives[:-1] for v in native.outputs}
            reads = tuple(
                v for native in natives for v in _reads(native) if v not in self.scope.constants and v not in between
            )
        weight, bias = (self._slot(place) for place in (translated.weight, translated.bias))
        if weight is not None and bias is not None and isinstance(translated.op, ops.LinearOp) and len(reads) > 1:
            # A parameter that is not constant is a further input, of which the rules of the planner know nothing.
            weight = replace(weight, obstacle=weight.obstacle or bias.obstacle)
        inputs = tuple(self._number(v) for v in reads)
        return Node(
            number, translated.op, name, inputs, tuple(self._number(v) for v in translated.outputs), weight, bias
        )

    def _slot(self, place: Place | None) -> Slot | None:
        if place is None:
            return None
        self.places[place.key] = place
        value = place.value
        if value is None:
            return Slot(place.key, None)
        constants = self.scope.constants
        return Slot(place.key, constants.tensor_shape(value) or (), str(value.name), constants.obstacle(value))

    def _number(self, value: ir.Value) -> int:
        return self.numbers.setdefault(value, len(self.numbers))

    def _graph(self, nodes: list[Node]) -> Graph:
        graph = self.model.graph
        outputs = tuple(self._number(v) for v in graph.outputs if v not in self.scope.constants)
        observed = {
            self.numbers[v]: Obstacle("BN102", f"{v.name} is an output of the model")
            for v in graph.outputs
            if v in self.numbers
        }
        values = {}
        for value, number in self.numbers.items():
            info = self.scope.info.get(str(value.name), TensorInfo())
            values[number] = Value(number, str(value.name), info.shape, info.dtype, observed.get(number))
        inputs = tuple(self.numbers[v] for v in graph.inputs if v not in self.scope.constants)
        return Graph(tuple(nodes), values, inputs, outputs, graph.name or "model")


def _primary(node: ir.Node, translated: Translated) -> ir.Value | None:
    """The input on which the operator acts. For arithmetic and a lookup, the rule has seen to it that one is data."""
    commutes = isinstance(translated.op, (ops.Affine, ops.Embedding)) and not (
        isinstance(translated.op, ops.Affine) and translated.op.norm
    )
    return None if commutes or not node.inputs else node.inputs[0]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads of its own graph, once per read: its inputs, and what its subgraphs capture."""
    yield from (v for v in node.inputs if v is not None)
    inner = set(_subgraphs(node))
    for graph in inner:
        reads = (v for n in graph for v in n.inputs if v is not None)
        yield from (v for v in (*reads, *graph.outputs) if v.graph not in inner)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """All graphs inside a node, at any depth."""
    for attribute in node.attributes.values():
        graphs = (
            (attribute.as_graph(),)
            if attribute.type == ir.AttributeType.GRAPH
            else attribute.as_graphs()
            if attribute.type == ir.AttributeType.GRAPHS
            else ()
        )
        for graph in graphs:
            yield graph
            for inner in graph:
                yield from _subgraphs(inner)


def _hidden_batch_norms(model: ir.Model) -> Iterator[ir.Node]:
    """BatchNormalization nodes in subgraphs and in local functions."""
    graphs = (*model.graph.subgraphs(), *(f.graph for f in model.functions.values()))
    for graph in graphs:
        yield from (n for n in graph if n.op_type == _BATCH_NORM and n.domain == "")
