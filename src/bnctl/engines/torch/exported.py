"""The code of a graph that torch.export made: its nodes, and the operators of a record that each of them ran.

Such a graph calls operators one by one, so a record of it can be laid beside its nodes. An affine is then taken out by letting another node stand for its
own: all else in the graph stays as it is, sizes that are computed from sizes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bnctl.engines.torch.calls import Calls, join
from bnctl.engines.torch.hooks import hooked, watched_at_entry
from bnctl.engines.torch.record import ALIASED_WRITE, ModuleCall, OpCall, Ref, Trace

_GUARDS = "_guards_fn"


def nodes_of(call: ModuleCall, calls: Calls) -> dict[int, str] | None:
    """For each value that a call of a graph module made or was given, the name of the node that did; None where record and graph cannot be told to agree.

    Args:
        call: of an ``fx.GraphModule``.
        calls: of the record.
    """
    assert isinstance(call.module, fx.GraphModule)
    reader = _Reader(call, call.module.graph, calls)
    return reader.made_by if reader.read() else None


def written_numbers(trace: Trace) -> set[tuple[int, int]]:
    """Operators in a record, and their arguments by position, that are numbers in an exported graph: what depends on a size is no number there, but a node."""
    graphs = [call for call in trace.modules if isinstance(call.module, fx.GraphModule) and call.path is not None]
    if not graphs:
        return set()
    calls, found = Calls(trace), set[tuple[int, int]]()
    for call in graphs:
        reader = _Reader(call, call.module.graph, calls)  # type: ignore[arg-type]
        if reader.read():
            numbers = (
                (op, i) for op, node in reader.ran for i, given in enumerate(node.args) if type(given) in _NUMBERS
            )
            found |= {(calls.place[id(op)], position) for op, position in numbers}
    return found


_NUMBERS = {int, float}


def let_stand_for(graph_module: fx.GraphModule, aliases: Mapping[str, str]) -> None:
    """Let nodes take the place of others in all that reads them, in place; what nobody reads any more goes, with what it alone rested on.

    Args:
        graph_module: its graph and its code are changed.
        aliases: names of nodes, and of those that stand for them now.

    Raises:
        KeyError: the graph has no such node.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for name in aliases:
        other = name
        while other in aliases:
            other = aliases[other]
        nodes[name].replace_all_uses_with(nodes[other])
    idle: list[fx.Node] = []
    # Nobody reads them now; and whether they wrote in place does not matter: they are what is taken out.
    for name in aliases:
        idle += nodes[name].all_input_nodes
        graph_module.graph.erase_node(nodes.pop(name))
    while idle:
        node = idle.pop()
        if node.name in nodes and not node.users and _may_go(node, graph_module):
            idle += node.all_input_nodes
            graph_module.graph.erase_node(nodes.pop(node.name))
    graph_module.recompile()


def _may_go(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether nobody misses a node that nobody reads: a write, and hooks of a layer, may be there for what they do."""
    if node.op != "call_module":
        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        return node.op in {"call_function", "get_attr"} and not writes
    parts = graph_module.get_submodule(str(node.target)).modules()
    return not any(hooked(part) or watched_at_entry(part) for part in parts)


class _Reader:
    def __init__(self, call: ModuleCall, graph: fx.Graph, calls: Calls) -> None:
        self.call, self.graph, self.trace = call, graph, calls.trace
        children: list[tuple[int, int, OpCall | ModuleCall]] = [(c.start, 0, c) for c in calls.children[call]]
        own: list[tuple[int, int, OpCall | ModuleCall]] = [(calls.place[id(op)], 1, op) for op in calls.own(call)]
        self.events = [event for *_, event in sorted((*children, *own), key=lambda entry: entry[:2])]
        self.inside = calls.inside
        self.parameters = {name: value for value, names in self.trace.parameters.items() for name in names}
        self.results: dict[fx.Node, Any] = {}
        self.made_by: dict[int, str] = {}
        self.ran: list[tuple[OpCall, fx.Node]] = []
        self.lost = False

    def read(self) -> bool:
        """Whether record and graph agree, and to the end."""
        given = pytree.tree_leaves((self.call.args, self.call.kwargs))
        if len(given) != sum(node.op == "placeholder" for node in self.graph.nodes):
            return False
        for node in self.graph.nodes:
            self._follow_writes()
            if node.op == "placeholder":
                self._note(node, given.pop(0))
            elif node.op == "get_attr":
                self._note(node, self._stored(str(node.target)))
            elif node.op == "call_module":
                if not self._called(node):
                    return False
            elif node.op == "call_function":
                self._ran(node)
            elif node.op != "output":
                return False
        self._follow_writes()
        return not (self.events or self.lost)

    def _stored(self, target: str) -> Ref | None:
        value = self.parameters.get(join(self.call.path or "", target))
        return None if value is None else Ref(value)

    def _called(self, node: fx.Node) -> bool:
        """Whether the next event is the call of the module that a node calls."""
        event = self.events[0] if self.events else None
        if not isinstance(event, ModuleCall) or event.path != join(self.call.path or "", str(node.target)):
            return False
        self.events.pop(0)
        for op in self.inside.get(event, ()):
            self._rename(op)
        self._note(node, event.result)
        return True

    def _ran(self, node: fx.Node) -> None:
        """Note what a node made: by the operator that is next in the record, if it is the node's own; of one that handed back its input, that."""
        if not isinstance(node.target, torch._ops.OpOverload):
            source = self.results.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
            is_item = getattr(node.target, "__name__", "") == "getitem" and isinstance(source, (tuple, list))
            self._note(node, source[node.args[1]] if is_item and isinstance(node.args[1], int) else None)  # type: ignore[index]
            return
        event = self.events[0] if self.events else None
        if isinstance(event, OpCall) and self._fits(event, node):
            self.events.pop(0)
            self.ran.append((event, node))
            self._rename(event)
            made = event.outputs[-1:] if event.writes else event.outputs
            several = len(made) != 1 or "[]" in str(node.target._schema.returns[0].type)
            self._note(node, tuple(map(Ref, made)) if several else Ref(made[0]))
        elif node.args and isinstance(node.args[0], fx.Node):
            self.results[node] = self.results.get(node.args[0])

    def _fits(self, event: OpCall, node: fx.Node) -> bool:
        """Whether an operator may be what a node ran: it has its name, and read the tensors that the node is given, as far as these are known."""
        read = iter([leaf for leaf in pytree.tree_leaves((event.args, event.kwargs)) if isinstance(leaf, Ref)])
        given = [self.results.get(n) for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node)]
        return event.op == str(node.target) and all(ref in read for ref in given if isinstance(ref, Ref))

    def _note(self, node: fx.Node, result: Any) -> None:
        self.results[node] = result
        if isinstance(result, Ref):
            self.made_by.setdefault(result.value, node.name)

    def _follow_writes(self) -> None:
        """Pass over the pseudo-operators of writes through views."""
        while self.events and isinstance(self.events[0], OpCall) and self.events[0].op == ALIASED_WRITE:
            self._rename(self.events.pop(0))  # type: ignore[arg-type]

    def _rename(self, op: OpCall) -> None:
        """A value that is written in place has another number from then on."""
        if op.writes and not op.op.rpartition(".")[0].endswith("_"):
            self.lost = True  # it writes into another argument than its first
        if op.writes or op.op == ALIASED_WRITE:
            new = {op.inputs[0]: op.outputs[0]}
            self.results = {node: _with(result, new) for node, result in self.results.items()}


def _with(result: Any, new: Mapping[int, int]) -> Any:
    if isinstance(result, Ref):
        return Ref(new.get(result.value, result.value))
    if isinstance(result, (tuple, list)):
        return type(result)(_with(item, new) for item in result)
    return result
