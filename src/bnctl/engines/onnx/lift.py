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
from bnctl.engines.onnx import elementwise, linear, movement, windows
from bnctl.engines.onnx.constants import Constants
from bnctl.engines.onnx.functions import with_functions_inlined
from bnctl.engines.onnx.names import layer_names
from bnctl.engines.onnx.scopes import bodies, captured, opsets, subgraphs, uniquely_named, within
from bnctl.engines.onnx.shapes import TensorInfo, infer_info
from bnctl.engines.onnx.statistics import Statistics
from bnctl.engines.onnx.translated import Place, Rule, Scope, Translated
from bnctl.errors import ModelError
from bnctl.graph import ops
from bnctl.graph.graph import Graph, Node, Slot, Value
from bnctl.plan.fold import plan_fold

OLDEST_OPSET = 7
"""Before it, arithmetic broadcast by an attribute and BatchNormalization had a test mode. ONNX Runtime does not promise to run it either."""

_RULES: dict[str, Rule] = linear.RULES | elementwise.RULES | movement.RULES | windows.RULES
_BATCH_NORM = "BatchNormalization"


@dataclass(frozen=True, eq=False)
class Lifted:
    """The graph of an ONNX model, and the way back.

    Args:
        model: what was translated: the model as it came, or a structural copy. Nobody changes it.
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
    """Translate a model. It is not changed; where local functions hold layers, or subgraphs use a name twice, a structural copy is translated.

    The bodies of If, Loop and Scan are part of the graph. An opaque node in front of each body makes what the body is given (its inputs, and the values of
    the graphs around it that it reads), and the body's outputs are observed, so that nothing moves over its border (BN120).

    Raises:
        ModelError: the opset is older than 7.
    """
    opset = opsets(model.opset_imports).get("", OLDEST_OPSET)
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"{model.graph.name or 'the model'} uses opset {opset}, and the oldest that bnctl reads is {OLDEST_OPSET}",
            hint="convert it with onnx.version_converter.convert_version(model, 13)",
        )
    if model.functions:
        model = with_functions_inlined(model, lambda flat: touched_nodes(_lifted(flat)))
    return _lifted(model)


def touched_nodes(lifted: Lifted) -> Iterator[ir.Node]:
    """The native nodes that folding would change, remove or move something through."""
    plan, graph = plan_fold(lifted.graph), lifted.graph
    moved_through = [graph.producer[v] for v in plan.meaning if v in graph.producer]
    for node in (*plan.removed, *(edit.node for edit in plan.edits), *moved_through):
        yield from lifted.natives[node.id]


def _lifted(model: ir.Model) -> Lifted:
    model = uniquely_named(model)
    info = infer_info(model)
    scope = Scope(opsets(model.opset_imports).get("", OLDEST_OPSET), info, Constants(model, info))
    return _Lifter(model, scope).lift()


class _Lifter:
    def __init__(self, model: ir.Model, scope: Scope) -> None:
        self.model = model
        self.scope = scope
        self.numbers: dict[tuple[ir.Graph, ir.Value], int] = {}
        """A value that a body captures has a number of its own inside."""
        self.observed: dict[int, Obstacle] = {}
        self.places: dict[str, Place] = {}
        self.nodes: list[Node] = []
        self.natives: dict[int, tuple[ir.Node, ...]] = {}
        self.names: dict[ir.Node, str] = {}

    def lift(self) -> Lifted:
        graph = self.model.graph
        for value in graph.inputs:
            self._number(graph, value)
        hidden = tuple(self._hidden_batch_norms())
        data_nodes = [n for g in _entered(graph) for n in g if not self._is_constant(n)]
        self.names = layer_names((*data_nodes, *hidden))
        self._add_graph(graph)
        for native in hidden:
            op = ops.Norm(
                _BATCH_NORM, Obstacle("BN120", "it is inside a local function, or in a graph that bnctl does not enter")
            )
            self._add(Node(len(self.nodes), op, self.names[native], (), ()), native)
        for value in graph.outputs:
            if value not in self.scope.constants:
                self.observed[self._number(graph, value)] = Obstacle("BN102", f"{value.name} is an output of the model")
        return Lifted(self.model, self._graph(), self.natives, self.places, self.scope.constants, self.scope.info)

    def _add_graph(self, graph: ir.Graph) -> None:
        spanned: set[ir.Node] = set()
        for native in graph:
            if native in spanned or self._is_constant(native):
                continue
            for body in bodies(native):
                self._add_body(native, body, graph)
            translated = self._translate(native)
            natives = (native,) if translated.last is None else (native, translated.last)
            spanned.update(natives)
            self._add(self._node(graph, translated, natives), *natives)

    def _add_body(self, holder: ir.Node, body: ir.Graph, around: ir.Graph) -> None:
        name = self.names[holder]
        border = Obstacle("BN120", f"the way leads over the border of a subgraph of {name}")
        given = [v for v in captured(body) if v not in self.scope.constants]
        inputs = tuple(self._number(around, v) for v in given)
        outputs = tuple(self._number(body, v) for v in (*given, *body.inputs))
        op = ops.Opaque(f"the border of {holder.op_type}", border)
        self._add(Node(len(self.nodes), op, name, inputs, outputs), holder)
        self._add_graph(body)
        for value in body.outputs:
            if value not in self.scope.constants:
                self.observed[self._number(body, value)] = border

    def _add(self, node: Node, *natives: ir.Node) -> None:
        self.nodes.append(node)
        self.natives[node.id] = natives

    def _hidden_batch_norms(self) -> Iterator[ir.Node]:
        """BatchNormalization nodes in local functions, and in graphs that are not entered."""
        entered = set(_entered(self.model.graph))
        graphs = (self.model.graph, *(f.graph for f in self.model.functions.values()))
        for graph in (inner for g in graphs for inner in within(g)):
            if graph not in entered:
                yield from (n for n in graph if n.op_type == _BATCH_NORM and n.domain == "")

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
        everything = tuple(v for v in node.outputs if v.name)
        if translated is not None and isinstance(translated.op, ops.Norm):  # in training, too, a BatchNorm is a site
            return Translated(translated.op, outputs=everything)
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        return Translated(ops.Opaque(kind), outputs=everything)

    def _node(self, graph: ir.Graph, translated: Translated, natives: tuple[ir.Node, ...]) -> Node:
        reads = translated.reads
        if reads is None:
            between = {v for native in natives[:-1] for v in native.outputs}
            reads = tuple(
                v for native in natives for v in _reads(native) if v not in self.scope.constants and v not in between
            )
        weight, bias = (self._slot(place) for place in (translated.weight, translated.bias))
        obstacle = None
        if isinstance(translated.op, ops.LinearOp):
            if weight is not None and bias is not None and len(reads) > 1:
                # A parameter that is not constant is a further input, of which the rules of the planner know nothing.
                weight = replace(weight, obstacle=weight.obstacle or bias.obstacle)
            if graph is not self.model.graph:
                obstacle = Obstacle(
                    "BN120", "nothing is inserted in a subgraph: its values cannot be looked at one by one"
                )
        return Node(
            len(self.nodes),
            translated.op,
            self.names[natives[0]],
            tuple(self._number(graph, v) for v in reads),
            tuple(self._number(graph, v) for v in translated.outputs),
            weight,
            bias,
            obstacle,
        )

    def _slot(self, place: Place | None) -> Slot | None:
        if place is None:
            return None
        self.places[place.key] = place
        value = place.value
        if value is None:
            return Slot(place.key, None)
        constants = self.scope.constants
        origin, others = constants.tie(value)
        places = len(value.uses()) + value.is_graph_output() + others
        shape, obstacle = constants.tensor_shape(value) or (), constants.obstacle(value)
        return Slot(place.key, shape, str(value.name), obstacle, places, origin)

    def _number(self, graph: ir.Graph, value: ir.Value) -> int:
        return self.numbers.setdefault((graph, value), len(self.numbers))

    def _graph(self) -> Graph:
        graph, constants = self.model.graph, self.scope.constants
        values = {}
        for (_, value), number in self.numbers.items():
            info = self.scope.of(value)
            values[number] = Value(number, str(value.name), info.shape, info.dtype, self.observed.get(number))
        inputs, outputs = (
            tuple(self._number(graph, v) for v in ends if v not in constants) for ends in (graph.inputs, graph.outputs)
        )
        return Graph(tuple(self.nodes), values, inputs, outputs, graph.name or "model")


def _entered(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph, and those inside it that are part of the normalised graph."""
    yield graph
    for node in graph:
        for body in bodies(node):
            yield from _entered(body)


def _primary(node: ir.Node, translated: Translated) -> ir.Value | None:
    """The input on which the operator acts. For arithmetic and a lookup, the rule has seen to it that one is data."""
    commutes = isinstance(translated.op, (ops.Affine, ops.Embedding)) and not (
        isinstance(translated.op, ops.Affine) and translated.op.norm
    )
    return None if commutes or not node.inputs else node.inputs[0]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads as a whole, once per read: its inputs, and what graphs inside it capture that are not entered."""
    yield from (v for v in node.inputs if v is not None)
    entered = bodies(node)
    for graph in subgraphs(node):
        if graph not in entered:
            yield from captured(graph)
