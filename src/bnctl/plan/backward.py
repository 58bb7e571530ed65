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
from bnctl.plan.moves import Absorb, Choice, Move, Pass


@singledispatch
def backward(op: ops.Op, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    """Move ``m``, which acts on the value ``output``, to the other side of the node that makes it."""
    return Obstacle("BN116", f"no rule to move an affine back through {op.label} ({node.layer})")


@backward.register
def _(op: ops.Opaque, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return op.obstacle or Obstacle("BN116", f"no rule to move an affine back through {op.label} ({node.layer})")


@backward.register
def _(op: ops.Activation, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return Obstacle("BN103", f"{op.label} ({node.layer}) stands between it and a linear operator")


@backward.register
def _(op: ops.Norm, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    taken = _into_norm(op, node, m) if output == node.outputs[0] else None
    return taken or Obstacle("BN103", f"{op.label} ({node.layer}) stands between it and a linear operator")


@backward.register
def _(op: ops.LinearOp, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    assert node.weight is not None and node.weight.shape is not None
    if node.weight.obstacle:
        return node.weight.obstacle
    axis = m.rank - op.spatial - 1
    _, channels = op.layout.channels(node.weight.shape)
    vectors = m.vectors(axis, channels)
    if vectors is None:
        return Obstacle(
            "BN110", f"it varies over shape {m.shape}, but the channels of {op.label} {node.layer} are axis {axis}"
        )
    if node.bias is not None and node.bias.obstacle:  # a bias is scaled, too, where the shift is 0
        return node.bias.obstacle
    if node.bias is None and not isinstance(op, ops.Embedding) and np.any(vectors[1] != 0):
        return Obstacle("BN118", f"{op.label} {node.layer} has no bias, and none can be added")
    return Absorb("output", *vectors)


@backward.register
def _(op: ops.Affine, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    taken = _into_norm(op, node, m)
    if taken is not None:
        return taken
    moved = m.conjugate(op.map)  # past an affine that takes nothing in
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
def _(op: ops.Rearrange, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return rearranged(op.inverse, node, m, node.inputs[0])


@backward.register
def _(op: ops.Concat, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    axis = op.axis
    sizes = part_sizes(op, node, graph)
    if m.shape[axis] == 1:
        own_maps = [m] * len(sizes)
    elif None in sizes:
        return Obstacle("BN116", f"the sizes of the parts of concat {node.layer} are not known")
    else:
        own_maps = m.split(axis, [n for n in sizes if n is not None])
    inputs = iter(node.inputs)
    maps = []
    if op.stacked:
        own_maps = [own.squeezed((axis,)) for own in own_maps]
    for part, own in zip(op.parts, own_maps, strict=True):
        if part is None:
            maps.append((next(inputs), own))
        elif not own.fixes(part):
            return Obstacle("BN114", f"it also acts on a constant part of concat {node.layer}")
    return Pass(tuple(maps))


@backward.register
def _(op: ops.Select, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    own = node.outputs.index(output)
    others = [
        part for value, part in zip(node.outputs, op.parts, strict=True) if value != output and _is_read(value, graph)
    ]
    if any(not apart(op.parts[own], part) for part in others):
        return Obstacle("BN101", f"{node.layer} gives some of its elements to several values")
    # Elements that nobody takes may become anything, and with no other reader a map that is constant along an axis stays so.
    alone = not others and len(graph.readers[node.inputs[0]]) == 1
    shape = graph.values[node.inputs[0]].shape
    m = m.expanded(op.dropped)
    for axis, positions in op.parts[own].items():
        if alone and m.shape[axis] == 1:
            continue
        size = shape[axis] if shape is not None else None
        if positions is None or not isinstance(size, int):
            return Obstacle("BN116", f"the sizes around {node.layer} are not known")
        moved = m.put(axis, positions, size)
        if moved is None:
            return Obstacle("BN110", f"it varies over elements that {node.layer} takes from the same place")
        m = moved
    return Pass(((node.inputs[0], m),))


def _is_read(value: int, graph: Graph) -> bool:
    return bool(graph.readers[value] or graph.values[value].observed)


def apart(one: dict[int, ops.Positions], two: dict[int, ops.Positions]) -> bool:
    """Whether two selections from one value have no element in common."""
    shared = ((one[axis], two[axis]) for axis in one.keys() & two.keys())
    return any(a is not None and b is not None and set(a).isdisjoint(b) for a, b in shared)


def undisturbed(other: Node, via: Node, m: AffineMap) -> bool:
    """Whether another reader of a value sees nothing of ``m``, which moves back to it from the reader ``via``: they select different elements."""
    if not isinstance(other.op, ops.Select) or not isinstance(via.op, ops.Select):
        return False
    return all(apart(part, own) and _seen(m, part).identity for part in other.op.parts for own in via.op.parts)


def _seen(m: AffineMap, part: dict[int, ops.Positions]) -> AffineMap:
    for axis, positions in part.items():
        if positions is not None:
            m = m.take(axis, positions)
    return m


@backward.register
def _(op: ops.Sum, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    # s*(a - b) + t = (s*a + t) - s*b = s*a - (s*b - t): all branches take the scale, and any one of them the shift.
    linear = _narrowed(m.linear, node, graph)
    if isinstance(linear, Obstacle):
        return linear
    if not np.any(m.shift):
        return Pass(tuple(linear))
    options = []
    for i, (value, sign) in enumerate(zip(node.inputs, op.signs, strict=True)):
        whole = AffineMap(m.scale, sign * m.shift).narrowed(graph.values[value].shape)
        if whole is not None:
            options.append(Pass((*linear[:i], (value, whole), *linear[i + 1 :])))
    return Choice(tuple(options)) if options else _broadcast(m, node)


@backward.register
def _(op: ops.Product, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    # s*(a*b) = (s*a)*b: one factor takes the scale.
    if np.any(m.shift):
        return Obstacle("BN103", f"a product of two values ({node.layer}) has no room for the shift")
    maps = [(value, m.narrowed(graph.values[value].shape)) for value in node.inputs]
    options = tuple(Pass(((value, own),)) for value, own in maps if own is not None)
    return Choice(options) if options else _broadcast(m, node)


@backward.register
def _(op: ops.Extremum, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    # s*max(a, b) + t = max(s*a + t, s*b + t) for s >= 0: all operands take the whole.
    whole = monotonic(op, node, graph, m) or _narrowed(m, node, graph)
    return whole if isinstance(whole, Obstacle) else Pass(tuple(whole))


@backward.register
def _(op: ops.MatMul, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    # s*(A b) = A (s*b), and t = A t where the rows of A sum to one.
    if np.any(m.shift) and not _rows_sum_to_one(node.inputs[0], graph):
        return Obstacle("BN103", f"a product of two values ({node.layer}) has no room for the shift")
    return _to_rows(m, node, node.inputs[1], output, graph)


@backward.register
def _(op: ops.Attention, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return _to_rows(m, node, node.inputs[2], output, graph)


def _to_rows(m: AffineMap, node: Node, value: int, output: int, graph: Graph) -> Move:
    """Move a map from rows to the rows that they are weighted sums of; it must be the same for all of them."""
    whole, own = graph.values[output].shape, graph.values[value].shape
    if whole is None or own is None or len(whole) < 2 or len(own) != len(whole):
        return Obstacle("BN116", f"the shapes around {node.layer} are not known well enough")
    if m.shape[-2] != 1 or any(n not in (1, size) for n, size in zip(m.shape[:-2], own[:-2], strict=True)):
        return Obstacle("BN110", f"it varies over the rows that {node.layer} mixes")
    return Pass(((value, m),))


def _rows_sum_to_one(value: int, graph: Graph) -> bool:
    producer = graph.producer.get(value)
    while producer is not None and isinstance(producer.op, ops.Identity):
        value = producer.inputs[0]
        producer = graph.producer.get(value)
    rank = graph.rank(value)
    softmax = producer is not None and isinstance(producer.op, ops.Activation) and producer.op.kind == "softmax"
    axis = producer.op.axis if softmax and producer is not None and isinstance(producer.op, ops.Activation) else None
    return axis is not None and rank is not None and axis % rank == rank - 1


def _narrowed(m: AffineMap, node: Node, graph: Graph) -> list[tuple[int, AffineMap]] | Obstacle:
    maps = []
    for value in node.inputs:
        own = m.narrowed(graph.values[value].shape)
        if own is None:
            return _broadcast(m, node)
        maps.append((value, own))
    return maps


def _broadcast(m: AffineMap, node: Node) -> Obstacle:
    return Obstacle(
        "BN110", f"it varies over shape {m.shape}, along which a branch of {node.op.label} {node.layer} is broadcast"
    )


@backward.register
def _(op: ops.Average | ops.MaxPool, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    return _positions(node, output) or along_channels(op, node, graph, m, node.inputs[0])


@backward.register
def _(op: ops.Reduce, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    if positions := _positions(node, output):
        return positions
    if not op.keepdims:
        m = m.expanded(op.axes)
    if op.kind == "sum" and np.any(m.shift):
        if not op.count:
            return Obstacle("BN116", f"the number of elements that {node.layer} adds up is not known")
        m = AffineMap(m.scale, m.shift / op.count)
    return monotonic(op, node, graph, m) or Pass(((node.inputs[0], m),))


def _positions(node: Node, output: int) -> Obstacle | None:
    return (
        Obstacle("BN103", f"it acts on the positions that {node.layer} returns") if output != node.outputs[0] else None
    )


@backward.register
def _(op: ops.ConstantPad, node: Node, graph: Graph, output: int, m: AffineMap) -> Move:
    for axis, (before, behind) in enumerate(op.pads):
        if before or behind:
            size = m.shape[axis]
            outside = m.take(axis, [*range(before), *range(size - behind, size)])
            if not outside.fixes(op.value):
                return Obstacle("BN114", f"{node.layer} puts constants around the value")
            m = m.take(axis, range(before, size - behind))
    return Pass(((node.inputs[0], m),))


def _into_norm(op: ops.Affine | ops.Norm, node: Node, m: AffineMap) -> Absorb | None:
    """A normalisation layer that stays takes a later affine into gamma and beta."""
    gamma, beta = node.weight, node.bias
    if gamma is None or beta is None or gamma.obstacle or beta.obstacle or len(gamma.shape or ()) != 1:
        return None
    if gamma.tensor and gamma.tensor == beta.tensor:
        return None
    vectors = m.vectors(op.axis % m.rank, (gamma.shape or (0,))[0])
    return None if vectors is None else Absorb("output", *vectors)


# What is the same in both directions.


def rearranged(op: ops.Rearrange, node: Node, m: AffineMap, target: int) -> Move:
    """Split, permute and merge the axes of the map as those of the value."""
    moved = m.rearranged(op.split, op.axes, op.merged)
    return (
        Pass(((target, moved),))
        if moved is not None
        else Obstacle("BN116", f"the sizes around {node.layer} are not known")
    )


def along_channels(op: ops.Average | ops.MaxPool, node: Node, graph: Graph, m: AffineMap, target: int) -> Move:
    """Windows over space: what does not vary over space passes."""
    if any(n != 1 for n in m.shape[m.rank - op.spatial :]):
        return Obstacle("BN110", f"it varies over space, and {op.label} {node.layer} mixes positions")
    if isinstance(op, ops.Average) and op.partial and np.any(m.shift):
        return Obstacle("BN114", f"the weights of {op.label} {node.layer} do not sum to one everywhere")
    return monotonic(op, node, graph, m) or Pass(((target, m),))


def monotonic(
    op: ops.Average | ops.MaxPool | ops.Reduce | ops.Extremum, node: Node, graph: Graph, m: AffineMap
) -> Obstacle | None:
    """A maximum or minimum lets only scales >= 0 through."""
    if not (isinstance(op, ops.MaxPool | ops.Extremum) or (isinstance(op, ops.Reduce) and op.kind in {"max", "min"})):
        return None
    if any(_is_read(value, graph) for value in node.outputs[1:]) and np.any(m.scale == 0):
        return Obstacle("BN119", f"a scale is 0, and {node.layer} also returns where its maxima are")
    if np.any(m.scale < 0):
        return Obstacle("BN113", f"{int(np.sum(m.scale < 0))} scales are negative before {node.layer}")
    return None


def part_sizes(op: ops.Concat, node: Node, graph: Graph) -> list[int | None]:
    """The sizes of the parts of a concat along its axis, where they are known."""
    inputs = iter(node.inputs)
    shapes = [part.shape if part is not None else graph.values[next(inputs)].shape for part in op.parts]
    sizes = [1 if op.stacked else shape[op.axis] if shape is not None else None for shape in shapes]
    return [n if isinstance(n, int) else None for n in sizes]
