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
from bnctl.plan.backward import along_channels, monotonic, part_sizes, rearranged
from bnctl.plan.moves import Absorb, Move, Pass

_BRANCHES = (ops.Concat, ops.Sum, ops.Product)


def forward(op: ops.Op, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    """Move ``m``, which acts on input number ``index`` of the node, to its other side."""
    if index and not isinstance(op, (*_BRANCHES, ops.Opaque, ops.Norm, ops.Activation)):
        return Obstacle("BN116", f"it steers {op.label} ({node.layer}): it is no data that the operator moves")
    return _forward(op, node, graph, index, m)


@singledispatch
def _forward(op: ops.Op, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Obstacle("BN116", f"no rule to move an affine forward through {op.label} ({node.layer})")


@_forward.register
def _(op: ops.Opaque, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return op.obstacle or Obstacle("BN116", f"no rule to move an affine forward through {op.label} ({node.layer})")


@_forward.register
def _(op: ops.Activation | ops.Norm, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Obstacle("BN103", f"it feeds {op.label} ({node.layer})")


@_forward.register
def _(op: ops.LinearOp, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    assert node.weight is not None and node.weight.shape is not None
    if node.weight.obstacle:
        return node.weight.obstacle
    axis = m.rank - op.spatial - 1
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


@_forward.register
def _(op: ops.Embedding, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Obstacle("BN103", f"it feeds the indices of embedding {node.layer}")


@_forward.register
def _(op: ops.Affine, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Pass(((node.outputs[0], m.push(op.map)),))


@_forward.register
def _(op: ops.Identity, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Pass(((node.outputs[0], m),))


@_forward.register
def _(op: ops.Reshape, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    old, new = graph.values[node.inputs[0]].shape, graph.values[node.outputs[0]].shape
    moved = m.reshaped(old, new) if old is not None and new is not None else None
    if moved is None:
        return Obstacle("BN116", f"the shapes around reshape {node.layer} are not known well enough: {old} to {new}")
    return Pass(((node.outputs[0], moved),))


@_forward.register
def _(op: ops.Permute, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return Pass(((node.outputs[0], m.permuted(op.axes)),))


@_forward.register
def _(op: ops.Rearrange, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return rearranged(op, node, m, node.outputs[0])


@_forward.register
def _(op: ops.Concat, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    # The identity on all other parts.
    sizes = part_sizes(op, node, graph)
    if any(n is None for n in sizes):
        return Obstacle("BN116", f"the sizes of the parts of concat {node.layer} are not known")
    position = [i for i, part in enumerate(op.parts) if part is None][index]
    start, size = sum(n or 0 for n in sizes[:position]), sizes[position] or 0
    m = m.expanded((op.axis,)) if op.stacked else m
    moved = m.put(op.axis, range(start, start + size), sum(n or 0 for n in sizes))
    assert moved is not None  # no element is taken twice
    return Pass(((node.outputs[0], moved),))


@_forward.register
def _(op: ops.Select, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    maps = []
    for value, part in zip(node.outputs, op.parts, strict=True):
        own = m
        for axis, positions in part.items():
            if own.shape[axis] != 1:
                if positions is None:
                    return Obstacle("BN116", f"the sizes around {node.layer} are not known")
                own = own.take(axis, positions)
        maps.append((value, own.squeezed(op.dropped)))
    return Pass(tuple(maps))


@_forward.register
def _(op: ops.Sum, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    rank = graph.rank(node.outputs[0])
    if np.any(m.scale != 1) or rank is None:
        return Obstacle("BN116", f"{op.label} {node.layer} lets only a shift of one branch through, and no scale")
    return Pass(((node.outputs[0], AffineMap(m.scale, op.signs[index] * m.shift).aligned(rank)),))


@_forward.register
def _(op: ops.Product, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    rank = graph.rank(node.outputs[0])
    if np.any(m.shift) or rank is None:
        return Obstacle("BN103", f"a product of two values ({node.layer}) lets no shift through")
    return Pass(((node.outputs[0], m.aligned(rank)),))


@_forward.register
def _(op: ops.ConstantPad, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    shape = graph.values[node.inputs[0]].shape
    for axis, (before, behind) in enumerate(op.pads):
        if not (before or behind):
            continue
        size = shape[axis] if shape is not None else None
        if m.shape[axis] != 1 and isinstance(size, int):  # the identity on what is put around it
            moved = m.put(axis, range(before, before + size), before + size + behind)
            assert moved is not None
            m = moved
        elif not m.fixes(op.value):
            return Obstacle("BN114", f"{node.layer} puts constants around it")
    return Pass(((node.outputs[0], m),))


@_forward.register
def _(op: ops.Average | ops.MaxPool, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    return along_channels(op, node, graph, m, node.outputs[0])


@_forward.register
def _(op: ops.Reduce, node: Node, graph: Graph, index: int, m: AffineMap) -> Move:
    if any(m.shape[a] != 1 for a in op.axes):
        return Obstacle("BN110", f"it varies along the axes over which {node.layer} takes the {op.kind}")
    if op.kind == "sum" and np.any(m.shift):
        if op.count is None:
            return Obstacle("BN116", f"the number of elements that {node.layer} adds up is not known")
        m = AffineMap(m.scale, m.shift * op.count)
    return monotonic(op, node, graph, m) or Pass(((node.outputs[0], m if op.keepdims else m.squeezed(op.axes)),))


def forward_padded(op: ops.Op, node: Node, m: AffineMap) -> Absorb | None:
    """A convolution with zeros around its input takes an affine in, by a further channel of ones: ``W*(s*x + t) = [W s, sum(W t)]*[x, 1]``.

    Padded with zeros, the ones say where the input is, so the border is right, and no scale is divided by. None for other operators.
    """
    if not isinstance(op, ops.Conv) or op.transposed or op.layout.groups != 1:
        return None
    assert node.weight is not None and node.weight.shape is not None
    vectors = m.vectors(m.rank - op.spatial - 1, op.layout.channels(node.weight.shape)[0])
    return None if vectors is None or node.weight.obstacle else Absorb("padded", *vectors)
