"""How an affine layer is taken out of a module tree.

A module call is *spent* when all that it does to data is an affine map, perhaps followed by things worth keeping: a BatchNorm;
a FrozenBatchNorm (a Mul and an Add); a LayerScale; a BatchNorm that transposes to reach the last axis; timm's BatchNormAct2d,
which calls its activation. The module is then replaced by what is kept of it: nothing (an Identity), or its tail of child
modules and elementwise operators. An affine in code that also does other things is *spliced* out of that code
(:mod:`bnctl.engines.torch.program`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bnctl.engines.torch.record import ModuleCall, OpCall, Ref, Trace
from bnctl.graph import ops
from bnctl.graph.affine import AffineMap
from bnctl.graph.graph import Node


@dataclass(frozen=True)
class Step:
    """One step of a tail: a child module by name, or an elementwise operator with its numbers."""

    child: str | None = None
    op: str | None = None
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Removal:
    """Replace the module at ``path`` by its tail; an empty tail is the identity."""

    path: str
    tail: tuple[Step, ...]


@dataclass(frozen=True)
class Splice:
    """Let the code of the module at ``path`` go on without some of its operators: in its program, other values stand for theirs."""

    path: str
    aliases: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bypass:
    """Let the graph module at ``path`` go on without some of its nodes: others, by name, stand for them."""

    path: str
    aliases: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Head:
    """The affine part of a module call: its whole map, the value it reads, the value it makes, the operators it consists of."""

    map: AffineMap
    source: int
    result: int
    calls: tuple[OpCall, ...]


def analyse(
    call: ModuleCall, inside: list[OpCall], node_of: Callable[[OpCall], Node], trace: Trace
) -> tuple[Head, Removal] | None:
    """Take a module call apart into an affine head and a tail; None where it is more than that.

    Args:
        call: the module call.
        inside: the operator calls in it, those of its children included.
        node_of: translates an operator call.
        trace: the record.
    """
    data = [c for c in inside if not all(v in trace.tensors for v in c.outputs)]
    inputs = [v for v in call.inputs if v not in trace.tensors]
    if len(inputs) != 1 or not data or call.path is None or not call.plain:
        return None
    head, value, taken = _head(inputs[0], call, data, node_of, trace)
    if head is None:
        return None
    tail = _tail(value, call, data[taken:], trace)
    if tail is None or trace.info[value].dtype != trace.info[inputs[0]].dtype:  # nothing is left that would convert
        return None
    return Head(head, inputs[0], value, tuple(data[:taken])), Removal(call.path, tail)


def _head(
    source: int, call: ModuleCall, data: list[OpCall], node_of: Callable[[OpCall], Node], trace: Trace
) -> tuple[AffineMap | None, int, int]:
    """The longest run of affine operators, with the reshapes between them, that gives a value of the input's own shape."""
    shape = trace.info[source].shape
    rank = len(shape)
    found: tuple[AffineMap | None, int, int] = (None, source, 0)
    whole: AffineMap | None = None
    value = source
    # From the axes of the current value to those of the source; where permutations have brought the axes, None after a reshape.
    back: list[Callable[[AffineMap], AffineMap | None]] = []
    order: tuple[int, ...] | None = tuple(range(rank))
    for position, op_call in enumerate(data):
        if op_call.within is not call:
            break
        node = node_of(op_call)
        if node.inputs != (value,) or not op_call.outputs:
            break
        old, value = trace.info[value].shape, op_call.outputs[0]
        new = trace.info[value].shape
        match node.op:
            case ops.Affine(map=m):
                moved: AffineMap | None = m
                for step in reversed(back):
                    moved = step(moved) if moved is not None else None
                if moved is None:
                    break
                whole = moved if whole is None else whole.then(moved)
            case ops.Identity():
                pass
            case ops.Reshape():
                back.append(lambda m, a=new, b=old: m.reshaped(a, b))  # type: ignore[misc]
                order = order if new == old else None
            case ops.Permute(axes=axes):
                inverse = tuple(axes.index(i) for i in range(len(axes)))
                back.append(lambda m, i=inverse: m.permuted(i))  # type: ignore[misc]
                order = tuple(order[a] for a in axes) if order is not None else None
            case _:
                break
        reshaped_back = (
            order is None
            and new == shape
            and not any(isinstance(node_of(c).op, ops.Permute) for c in data[: position + 1])
        )
        if whole is not None and (order == tuple(range(rank)) or reshaped_back):
            found = (whole, value, position + 1)
    return found


def _tail(value: int, call: ModuleCall, rest: list[OpCall], trace: Trace) -> tuple[Step, ...] | None:
    steps: list[Step] = []
    names = {id(child): name for name, child in call.module.named_children()}
    while rest:
        first = rest[0]
        if [v for v in first.inputs if v not in trace.tensors] != [value]:
            return None
        child = _child_call(first, call)
        if child is None:
            step, taken, made = _pointwise(first), 1, first.outputs
        else:
            name = names.get(id(child.module))
            step = Step(child=name) if name is not None else None
            taken, made = sum(1 for c in rest if _child_call(c, call) is child), tuple(child.outputs)
        if step is None or len(made) != 1:
            return None
        steps.append(step)
        value, rest = made[0], rest[taken:]
    return tuple(steps) if call.outputs == [value] else None


def _child_call(op_call: OpCall, parent: ModuleCall) -> ModuleCall | None:
    """The direct child of ``parent`` in which an operator ran; None where it ran in the parent's own code."""
    within = op_call.within
    if within is parent:
        return None
    while within.parent is not None and within.parent is not parent:
        within = within.parent
    return within


POINTWISE = frozenset(
    f"aten.{name}{suffix}.default"
    for name in (
        "relu relu6 hardtanh silu gelu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu "
        "celu mish softplus clamp neg"
    ).split()
    for suffix in ("", "_")
)
"""Elementwise operators that may be kept as such: they need no shapes, so they are right for any input."""


def _pointwise(call: OpCall) -> Step | None:
    plain = isinstance(call.args[0], Ref) and all(
        isinstance(a, (int, float, str, bool, type(None))) for a in call.args[1:]
    )
    if (
        call.op not in POINTWISE
        or not plain
        or any(not isinstance(v, (int, float, str, bool)) for v in call.kwargs.values())
    ):
        return None
    return Step(op=call.op, args=(call.args[1:], tuple(sorted(call.kwargs.items()))))
