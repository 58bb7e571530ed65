"""Whether something behind a layer works only because its result lies in memory of its own, in the usual order."""

from __future__ import annotations

from bnctl.codes import Obstacle
from bnctl.engines.torch.calls import Calls, layer_of
from bnctl.graph.graph import Node

_VIEWS = {"aten.view.default", "aten.view_as.default"}
"""Reshapes that never copy."""


def needs_memory(node: Node, calls: Calls) -> Obstacle | None:
    """The operator behind a layer of one input that would fail, or write elsewhere, on that input itself; None where there is none.

    Args:
        node: the layer.
        calls: of the record that it is from.
    """
    info = calls.trace.info
    before, after = (info[v].strides for v in (node.inputs[0], node.outputs[0]))
    if before == after:
        return None
    todo, seen = [node.outputs[0]], set[int]()
    while todo:
        value = todo.pop()
        for call in calls.readers[value]:
            if call.op in _VIEWS or (call.writes and 0 in before):
                return Obstacle("BN123", f"{call.op} in {layer_of(call)} needs the memory that {node.layer} makes")
            same = {made for made in call.outputs if info[made] == info[value]} - seen
            seen |= same
            todo += same
    return None
