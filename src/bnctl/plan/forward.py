"""Forwards, towards the consumers: how ``op(M(x))`` becomes ``op'(x)`` or ``M'(op(x))``.

One entry per operator. The planner asks every reader of the value; all of them must take the affine.
"""

from __future__ import annotations

from functools import singledispatch

import numpy as np

from bnctl.codes import Obstacle
from bnctl.graph import ops
from bnctl.graph.affine import AffineMap
from bnctl.graph.graph import Graph, Node
from bnctl.plan.backward import along_channels
from bnctl.plan.moves import Absorb, Move, Pass


@singledispatch
def forward(op: ops.Op, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    """Move ``m``, which acts on input number ``index`` of the node, to its other side."""
    return Obstacle("BN116", f"no rule to move an affine forward through {op.label} ({node.layer})")


@forward.register
def _(op: ops.Opaque, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return op.obstacle or Obstacle("BN116", f"no rule to move an affine forward through {op.label} ({node.layer})")


@forward.register
def _(op: ops.Activation | ops.Norm, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Obstacle("BN103", f"it feeds {op.label} ({node.layer})")


@forward.register
def _(op: ops.LinearOp, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    assert node.weight is not None and node.weight.shape is not None
    if node.weight.obstacle:
        return node.weight.obstacle
    axis = m.rank - op.spatial - 1 if isinstance(op, ops.Conv) else m.rank - 1
    channels, _ = op.layout.channels(node.weight.shape)
    vectors = m.vectors(axis, channels)
    if vectors is None:
        return Obstacle(
            "BN110",
            f"it varies over shape {m.shape}, but the input channels of {op.label} {node.layer} are axis {axis}",
        )
    if np.any(vectors[1] != 0):
        if isinstance(op, ops.Conv) and (op.padded or op.transposed):
            return Obstacle("BN114", f"{op.label} {node.layer} sees zeros around its input")
        if node.bias is None:
            return Obstacle("BN118", f"{op.label} {node.layer} has no bias, and none can be added")
        if node.bias.obstacle:
            return node.bias.obstacle
    return Absorb("input", *vectors)


@forward.register
def _(op: ops.Embedding, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Obstacle("BN103", f"it feeds the indices of embedding {node.layer}")


@forward.register
def _(op: ops.Affine, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Pass(((node.outputs[0], m.push(op.map)),))


@forward.register
def _(op: ops.Identity, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Pass(((node.outputs[0], m),))


@forward.register
def _(op: ops.Reshape, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    old, new = graph.values[node.inputs[0]].shape, graph.values[node.outputs[0]].shape
    moved = m.reshaped(old, new) if old is not None and new is not None else None
    if moved is None:
        return Obstacle("BN116", f"the shapes around reshape {node.layer} are not known well enough: {old} to {new}")
    return Pass(((node.outputs[0], moved),))


@forward.register
def _(op: ops.Permute, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Pass(((node.outputs[0], m.permuted(op.axes)),))


@forward.register
def _(op: ops.ConstantPad, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Obstacle("BN114", f"{node.layer} puts constants around it")


@forward.register
def _(op: ops.Slice, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    axis = op.axis % m.rank
    if m.shape[axis] == 1:
        return Pass(tuple((value, m) for value in node.outputs))
    moved = []
    for value, start in zip(node.outputs, op.starts, strict=True):
        shape = graph.values[value].shape
        size = shape[axis] if shape is not None else None
        if not isinstance(size, int):
            return Obstacle("BN116", f"the sizes of the parts of {node.layer} are not known")
        parts = m.split(axis, [start, size, m.shape[axis] - start - size])
        moved.append((value, parts[1]))
    return Pass(tuple(moved))


@forward.register
def _(op: ops.Average | ops.MaxPool, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return along_channels(op, node, m, node.outputs[0])


@forward.register
def _(op: ops.Mean, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    axes = tuple(a % m.rank for a in op.axes)
    if any(m.shape[a] != 1 for a in axes):
        return Obstacle("BN110", f"it varies along the axes over which {node.layer} takes the mean")
    if not op.keepdims:
        m = AffineMap(m.scale.squeeze(axes), m.shift.squeeze(axes))
    return Pass(((node.outputs[0], m),))
