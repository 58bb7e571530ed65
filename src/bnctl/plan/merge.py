"""The planner of `--merge-branches`: parallel linear operators over one value that are summed become one.

    W1 x + W2 x + s*x + t  =  (W1 + W2 + diag(s)) x + t

Convolutions with kernels of different sizes are the same thing: a small kernel is a large one with zeros around it, and an affine is a kernel of size
one. That is what RepVGG, MobileOne, ACNet and RepViT do by hand for their own blocks (Ding et al. 2021, arXiv:2101.03697); here it is read off the graph.

A sum of sums is one sum. The term with the largest kernel takes the others into its parameters, and they are dropped from the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bnctl.graph.affine import AffineMap, Array, Shape
from bnctl.graph.graph import Graph, Node
from bnctl.graph.ops import Affine, Conv, Embedding, Identity, LinearOp, Sum
from bnctl.graph.window import Window
from bnctl.numerics.merge import diagonal, placed


@dataclass(frozen=True, eq=False)
class Term:
    """One operand of a sum.

    Args:
        sign: 1 or -1, in the whole sum.
        value: the operand.
        source: the value that it is a linear function of.
        node: the linear operator or affine that makes it; None where it is the source itself.
        reader: the node that adds it, and the position among that node's inputs.
    """

    sign: int
    value: int
    source: int
    node: Node | None
    reader: tuple[Node, int]


@dataclass(frozen=True, eq=False)
class Merge:
    """One operator takes others in.

    Args:
        into: the operator that stays.
        terms: what it takes in; they are dropped from their sums.
        kernel: its new kernel size; empty for a linear layer.
        window: its new padding; None for a linear layer.
        sign: of the operator itself in the sum.
    """

    into: Node
    terms: tuple[Term, ...]
    kernel: tuple[int, ...]
    window: Window | None
    sign: int

    @property
    def grows(self) -> bool:
        """Whether kernel or padding change."""
        return isinstance(self.into.op, Conv) and (self.kernel, self.window) != (
            _kernel(self.into),
            self.into.op.window,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that are taken in."""
        return tuple(term.node.layer for term in self.terms if term.node is not None)


@dataclass(frozen=True)
class Limits:
    """What an engine can do.

    Args:
        resizable: whether a convolution can be given this kernel and padding.
        droppable: whether an operand of a sum can be left out.
    """

    resizable: Callable[[Node, Window], bool] = lambda node, window: True
    droppable: Callable[[Node], bool] = lambda node: True


def plan_merge(
    graph: Graph, *, limits: Limits | None = None, selected: Callable[[str], bool] = lambda name: True
) -> tuple[Merge, ...]:
    """The merges that can be made at once; there may be more after them.

    Args:
        graph: the model.
        limits: what the engine can do.
        selected: says by name which layers may be taken in.
    """
    limits = limits or Limits()
    merges: list[Merge] = []
    for node in graph.nodes:
        if isinstance(node.op, Sum) and not _is_inner(node, graph):
            terms = [t for t in _terms(node, graph, 1) if t.node is None or selected(t.node.layer)]
            for source in dict.fromkeys(term.source for term in terms):
                merge = _merge([t for t in terms if t.source == source], graph, limits)
                if merge is not None:  # one for each whole sum: there are other rounds
                    merges.append(merge)
                    break
    return tuple(merges)


def whole_sum(merge: Merge, graph: Graph) -> Node:
    """The sum of all terms, whose value stays."""
    return _above(merge.into, graph)[-1]


def changed_values(merge: Merge, graph: Graph) -> set[int]:
    """The values that are no longer what they were: between the terms and the whole sum."""
    starts = (merge.into, *(term.reader[0] for term in merge.terms))
    return {node.outputs[0] for start in starts for node in (start, *_above(start, graph))[:-1]}


def _above(node: Node, graph: Graph) -> list[Node]:
    """The sums, one in the other, that a term or an inner sum is part of; none above the whole one."""
    found: list[Node] = []
    while (isinstance(node.op, Sum) and _is_inner(node, graph)) or (not isinstance(node.op, Sum) and not found):
        node = graph.readers[node.outputs[0]][0]
        found.append(node)
    return found


def merged_parameters(merge: Merge, read: Callable[[Node], tuple[Array, Array | None]]) -> tuple[Array, Array]:
    """Weight and bias of the operator that stays, as stored, in float64.

    Args:
        merge: what is merged.
        read: the stored weight and bias of a linear operator.
    """
    op = merge.into.op
    assert isinstance(op, LinearOp)
    weight, bias = read(merge.into)
    canonical = op.layout.canonical(weight)
    groups, out = canonical.shape[:2]
    total = placed(canonical, _offset(merge, op), merge.kernel)
    shift = np.zeros(groups * out) if bias is None else np.array(np.broadcast_to(bias, groups * out))
    for term in merge.terms:
        sign = term.sign * merge.sign
        other = None if term.node is None else term.node.op
        if isinstance(other, LinearOp) and term.node is not None:
            own, own_bias = read(term.node)
            own = other.layout.canonical(own) * (other.weight_factor / op.weight_factor)
            if own_bias is not None:
                shift = shift + sign * own_bias * (other.bias_factor / op.bias_factor)
            total = total + sign * placed(own, _offset(merge, other), merge.kernel)
            continue
        s, t = _vectors(other, groups * out, op.spatial)
        own = diagonal(s / op.weight_factor, groups, len(merge.kernel))
        total = total + sign * placed(own, _offset(merge, None), merge.kernel)
        shift = shift + sign * t / op.bias_factor
    return op.layout.stored(total), shift


def _is_inner(node: Node, graph: Graph) -> bool:
    """Whether a sum is a term of another sum, and seen by nobody else."""
    value = node.outputs[0]
    readers = graph.readers[value]
    return len(readers) == 1 and isinstance(readers[0].op, Sum) and graph.values[value].observed is None


def _terms(node: Node, graph: Graph, sign: int) -> Iterator[Term]:
    assert isinstance(node.op, Sum)
    shape = graph.values[node.outputs[0]].shape
    for index, (value, own) in enumerate(zip(node.inputs, node.op.signs, strict=True)):
        producer = graph.producer.get(value)
        if not _may_be_equal(graph.values[value].shape, shape):  # it is broadcast
            continue
        private = len(graph.readers[value]) == 1 and graph.values[value].observed is None
        if producer is not None and isinstance(producer.op, Sum) and private:
            yield from _terms(producer, graph, sign * own)
        elif private and producer is not None and _takes_one_value(producer):
            yield Term(sign * own, value, _source(producer.inputs[0], graph), producer, (node, index))
        yield Term(sign * own, value, _source(value, graph), None, (node, index))


def _may_be_equal(one: Shape | None, two: Shape | None) -> bool:
    """Whether two shapes have as many axes and no two known sizes that differ. Linear operators over one value agree in the others where their windows join."""
    if one is None or two is None or len(one) != len(two):
        return False
    return all(a == b for a, b in zip(one, two, strict=True) if isinstance(a, int) and isinstance(b, int))


def _takes_one_value(node: Node) -> bool:
    linear = isinstance(node.op, LinearOp) and not isinstance(node.op, Embedding)
    return (linear or isinstance(node.op, Affine)) and len(node.inputs) == 1


def _source(value: int, graph: Graph) -> int:
    while (producer := graph.producer.get(value)) is not None and isinstance(producer.op, Identity):
        value = producer.inputs[0]
    return value


def _merge(terms: list[Term], graph: Graph, limits: Limits) -> Merge | None:
    """The terms over one source as one operator, as far as they fit the one with the largest kernel."""
    linear = [t for t in terms if t.node is not None and _can_take(t.node, graph)]
    for target in sorted(linear, key=lambda t: -int(np.prod(_kernel(t.node)))):
        assert target.node is not None
        taken: list[Term] = []
        merge = Merge(target.node, (), _kernel(target.node), getattr(target.node.op, "window", None), target.sign)
        for term in terms:
            wider = _with(merge, term, graph) if term is not target else None
            if wider is None or not limits.droppable(term.reader[0]) or not _leaves_a_sum(taken, term):
                continue
            if wider.grows and (wider.window is None or not limits.resizable(wider.into, wider.window)):
                continue
            merge = wider
            taken.append(term)
        if taken:
            return merge
    return None


def _can_take(node: Node, graph: Graph) -> bool:
    """Whether the parameters of a linear operator may be changed: nobody else reads them, and there is a place for a bias."""
    if not isinstance(node.op, LinearOp) or node.weight is None or node.bias is None:
        return False
    if isinstance(node.op, Conv) and (node.op.transposed or node.op.window is None):
        return False
    slots = (node.weight, node.bias)
    return all(
        s.obstacle is None
        and s.places == 1
        and len(graph.slot_readers[s.key]) == 1
        and len(graph.tensor_slots.get(s.tied_by, ())) <= 1
        for s in slots
    )


def _leaves_a_sum(taken: list[Term], term: Term) -> bool:
    """Whether, with this operand left out too, the node is still a sum, or its one operand left counts positive."""
    node = term.reader[0]
    assert isinstance(node.op, Sum)
    gone = {t.reader[1] for t in (*taken, term) if t.reader[0] is node}
    left = [sign for i, sign in enumerate(node.op.signs) if i not in gone]
    return len(left) > 1 or left == [1]


def _with(merge: Merge, term: Term, graph: Graph) -> Merge | None:
    """The merge with one more term, or None where it does not fit."""
    op = merge.into.op
    assert isinstance(op, LinearOp) and merge.into.weight is not None and merge.into.weight.shape is not None
    inner, outer = op.layout.channels(merge.into.weight.shape)
    other = None if term.node is None else term.node.op
    if isinstance(other, LinearOp):
        assert term.node is not None and term.node.weight is not None and term.node.weight.shape is not None
        parameters = (s for s in (term.node.weight, term.node.bias) if s is not None)
        if (type(other), other.spatial) != (type(op), op.spatial) or any(s.obstacle for s in parameters):
            return None
        if other.layout.groups != op.layout.groups or other.layout.channels(term.node.weight.shape) != (inner, outer):
            return None
        kernel = _kernel(term.node)
        window = other.window if isinstance(other, Conv) else None
        if isinstance(other, Conv) and (other.transposed or window is None):
            return None
    else:
        if inner != outer or _vectors(other, outer, op.spatial) is None:
            return None
        kernel = (1,) * len(merge.kernel)
        window = Window.single(len(kernel)) if isinstance(op, Conv) else None
    terms = (*merge.terms, term)
    if merge.window is None or window is None:
        return Merge(merge.into, terms, (), None, merge.sign) if merge.window is window else None
    joined = merge.window.joined(merge.kernel, window, kernel)
    return None if joined is None else Merge(merge.into, terms, joined[1], joined[0], merge.sign)


def _vectors(op: object, channels: int, spatial: int) -> tuple[Array, Array]:
    """Scale and shift of an affine per channel, or of the identity; None where it varies along another axis."""
    if op is None:
        return np.ones(channels), np.zeros(channels)
    assert isinstance(op, Affine)
    m: AffineMap = op.map
    return m.vectors(m.rank - spatial - 1, channels)  # type: ignore[return-value]


def _kernel(node: Node | None) -> tuple[int, ...]:
    if node is None or node.weight is None or not isinstance(node.op, Conv):
        return ()
    return (node.weight.shape or ())[2:]


def _offset(merge: Merge, op: LinearOp | None) -> tuple[int, ...]:
    """Where in the merged kernel the taps of one operator begin."""
    if merge.window is None:
        return ()
    before = op.window.before if isinstance(op, Conv) and op.window is not None else (0,) * len(merge.kernel)
    return tuple((a - b) // d for a, b, d in zip(merge.window.before, before, merge.window.dilation, strict=True))
