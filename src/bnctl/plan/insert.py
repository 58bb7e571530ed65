"""Where normalisation may go: after every linear layer that feeds an activation, never after the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bnctl.codes import Obstacle
from bnctl.graph import ops
from bnctl.graph.graph import Graph, Node

_TRANSPARENT = (
    ops.Identity,
    ops.Reshape,
    ops.Permute,
    ops.Rearrange,
    ops.Concat,
    ops.Select,
    ops.Sum,
    ops.Extremum,
    ops.Average,
    ops.MaxPool,
    ops.Reduce,
    ops.Affine,
)
_NOT_HIDDEN = {"softmax", "log_softmax"}

Selection = Literal["yes", "named", "no"]
"""Whether the user's globs take a layer; "named" where they name it exactly."""


@dataclass(frozen=True)
class InsertSite:
    """One linear layer.

    Args:
        name: the layer.
        nodes: its calls.
        features: its output channels.
        spatial: axes behind the channel axis; None where the channels are the last axis of three or more.
        obstacle: why nothing is inserted; None where something is.
    """

    name: str
    nodes: tuple[Node, ...]
    features: int
    spatial: int | None
    obstacle: Obstacle | None = None

    @property
    def values(self) -> tuple[int, ...]:
        """The values to be normalised, one per call."""
        return tuple(node.outputs[0] for node in self.nodes)


def plan_insert(
    graph: Graph, *, selection: Callable[[str], Selection] = lambda name: "yes", last_axis: bool = False
) -> tuple[InsertSite, ...]:
    """Judge every linear layer of a graph.

    Args:
        graph: the model.
        selection: whether the user's globs take a layer; a layer that is named exactly need not feed an activation.
        last_axis: the engine has a normalisation for channels on the last axis of three or more.
    """
    layers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.op, ops.LinearOp) and not isinstance(node.op, ops.Embedding):
            layers.setdefault(node.layer, []).append(node)
    before_linear = _leads_to_linear(graph)
    return tuple(
        _judge(graph, name, nodes, selection(name), last_axis, before_linear) for name, nodes in layers.items()
    )


def _judge(
    graph: Graph, name: str, nodes: list[Node], selection: Selection, last_axis: bool, before_linear: set[int]
) -> InsertSite:
    op = nodes[0].op
    assert isinstance(op, ops.LinearOp) and nodes[0].weight is not None and nodes[0].weight.shape is not None
    _, features = op.layout.channels(nodes[0].weight.shape)
    rank = graph.rank(nodes[0].outputs[0])
    spatial = op.spatial or (0 if rank == 2 else None)
    site = InsertSite(name, tuple(nodes), features, spatial)
    reached = set().union(*(_reached(graph, node.outputs[0]) for node in nodes))
    obstacle = next((node.obstacle for node in nodes if node.obstacle), None)
    if selection == "no":
        obstacle = Obstacle("BN204", "not selected by --where and --skip")
    elif obstacle is not None:
        pass
    elif "norm" in reached:
        obstacle = Obstacle("BN201", "its output goes into a normalisation layer")
    elif not any(node.outputs[0] in before_linear for node in nodes):
        obstacle = Obstacle("BN202", "no linear layer comes after it")
    elif "activation" not in reached and selection != "named":
        obstacle = Obstacle("BN203", "its output does not go into an activation")
    elif rank is None or (op.spatial and rank != op.spatial + 2) or (spatial is None and (not last_axis or rank < 3)):
        obstacle = Obstacle("BN205", f"its output has {'an unknown number of' if rank is None else rank} axes")
    return InsertSite(name, site.nodes, features, spatial, obstacle)


def _reached(graph: Graph, value: int) -> set[str]:
    """What a value goes into, seen through operators that only move or mix it."""
    found: set[str] = set()
    seen = {value}
    todo = [value]
    while todo:
        for node in graph.readers[todo.pop()]:
            op = node.op
            if isinstance(op, ops.Norm) or (isinstance(op, ops.Affine) and op.norm):
                found.add("norm")
            elif isinstance(op, ops.Activation) and op.kind not in _NOT_HIDDEN:
                found.add("activation")
            elif isinstance(op, _TRANSPARENT):
                todo += [v for v in node.outputs if v not in seen]
                seen.update(node.outputs)
    return found


def _leads_to_linear(graph: Graph) -> set[int]:
    """Values from which some linear operator can be reached."""
    found: set[int] = set()
    for node in reversed(graph.nodes):
        if isinstance(node.op, ops.LinearOp) or any(v in found for v in node.outputs):
            found.update(node.inputs)
    return found
