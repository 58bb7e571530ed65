"""Backwards, towards the producers: how ``M(op(x))`` becomes ``op'(x)`` or ``op(M'(x))``.

One entry per operator. The planner has already checked that nobody else reads the output of ``op``.
"""

from __future__ import annotations

from functools import singledispatch

import numpy as np

from bnctl.codes import Obstacle
from bnctl.graph import ops
from bnctl.graph.affine import AffineMap
from bnctl.graph.graph import Graph, Node
from bnctl.plan.moves import Absorb, Move, Pass


@singledispatch
def backward(op: ops.Op, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    """Move ``m``, which acts on the value ``output``, to the other side of the node that makes it."""
    return Obstacle("BN116", f"no rule to move an affine back through {op.label} ({node.layer})")


@backward.register
def _(op: ops.Opaque, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return op.obstacle or Obstacle("BN116", f"no rule to move an affine back through {op.label} ({node.layer})")


@backward.register
def _(op: ops.Activation | ops.Norm, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return Obstacle("BN103", f"{op.label} ({node.layer}) stands between it and a linear operator")


@backward.register
def _(op: ops.LinearOp, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    assert node.weight is not None and node.weight.shape is not None
    if node.weight.obstacle:
        return node.weight.obstacle
    axis = m.rank - op.spatial - 1 if isinstance(op, ops.Conv) else m.rank - 1
    _, channels = op.layout.channels(node.weight.shape)
    vectors = m.vectors(axis, channels)
    if vectors is None:
        return Obstacle(
            "BN110", f"it varies over shape {m.shape}, but the channels of {op.label} {node.layer} are axis {axis}"
        )
    if node.bias is None:
        if np.any(vectors[1] != 0):
            return Obstacle("BN118", f"{op.label} {node.layer} has no bias, and none can be added")
    elif node.bias.obstacle:  # a bias is scaled, too, where the shift is 0
        return node.bias.obstacle
    return Absorb("output", *vectors)


@backward.register
def _(op: ops.Affine, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    # A normalisation layer that stays takes a later affine into gamma and beta; past any other, the affine is moved.
    gamma, beta = node.weight, node.bias
    if gamma is not None and gamma.shape is not None and beta is not None and not (gamma.obstacle or beta.obstacle):
        vectors = m.vectors(op.axis, gamma.shape[0])
        if vectors is not None:
            return Absorb("output", *vectors)
    moved = m.conjugate(op.map)
    if moved is None:
        return Obstacle("BN119", f"{op.label} {node.layer} multiplies by 0")
    return Pass(((node.inputs[0], moved),))


@backward.register
def _(op: ops.Identity, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return Pass(((node.inputs[0], m),))


@backward.register
def _(op: ops.Reshape, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    old, new = graph.values[output].shape, graph.values[node.inputs[0]].shape
    moved = m.reshaped(old, new) if old is not None and new is not None else None
    if moved is None:
        return Obstacle("BN116", f"the shapes around reshape {node.layer} are not known well enough: {new} to {old}")
    return Pass(((node.inputs[0], moved),))


@backward.register
def _(op: ops.Permute, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return Pass(((node.inputs[0], m.permuted(tuple(int(i) for i in np.argsort(op.axes)))),))


@backward.register
def _(op: ops.Concat, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    axis = op.axis % m.rank
    if m.shape[axis] == 1:
        return Pass(tuple((value, m) for value in node.inputs))
    sizes = [shape[axis] if (shape := graph.values[value].shape) is not None else None for value in node.inputs]
    if not all(isinstance(n, int) for n in sizes):
        return Obstacle("BN116", f"the sizes of the parts of concat {node.layer} are not known")
    return Pass(tuple(zip(node.inputs, m.split(axis, [n for n in sizes if isinstance(n, int)]), strict=True)))


@backward.register
def _(op: ops.Slice, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    if len(node.outputs) > 1:
        return Obstacle("BN101", f"{node.layer} splits the value, and the other parts are read elsewhere")
    if m.shape[op.axis % m.rank] != 1:
        return Obstacle("BN116", f"it acts on a part of the channels that {node.layer} cuts out")
    return Pass(((node.inputs[0], m),))


@backward.register
def _(op: ops.Sum, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    first, second = node.inputs
    shape = graph.values[output].shape
    if shape is None or any(graph.values[v].shape != shape for v in node.inputs):
        return Obstacle("BN116", f"the branches of add {node.layer} are broadcast against each other")
    # s*(a + sign*b) + t = (s*a + t) + sign*(s*b): one branch takes the shift.
    return Pass(((first, m), (second, AffineMap(m.scale, np.zeros_like(m.shift)))))


@backward.register
def _(op: ops.Average | ops.MaxPool, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return along_channels(op, node, m, node.inputs[0])


@backward.register
def _(op: ops.Mean, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    rank = graph.rank(node.inputs[0])
    if rank is None:
        return Obstacle("BN116", f"the shape before mean {node.layer} is not known")
    axes = tuple(a % rank for a in op.axes)
    if not op.keepdims:
        m = AffineMap(np.expand_dims(m.scale, axes), np.expand_dims(m.shift, axes))
    return Pass(((node.inputs[0], m),))


def along_channels(op: ops.Average | ops.MaxPool, node: Node, m: AffineMap, target: int) -> Move:
    """Windows over space: what does not vary over space passes, and a maximum lets only scales >= 0 through. Both directions alike."""
    if any(n != 1 for n in m.shape[m.rank - op.spatial :]):
        return Obstacle("BN110", f"it varies over space, and {op.label} {node.layer} mixes positions")
    if isinstance(op, ops.MaxPool) and len(node.outputs) > 1 and np.any(m.scale == 0):
        return Obstacle("BN119", f"a scale is 0, and {node.layer} also returns where its maxima are")
    if isinstance(op, ops.MaxPool) and np.any(m.scale < 0):
        return Obstacle("BN113", f"{int(np.sum(m.scale < 0))} scales are negative before {node.layer}")
    return Pass(((target, m),))
