"""Operators that only move elements."""

from __future__ import annotations

from itertools import accumulate

from bnctl.engines.torch.record import OpCall, Ref
from bnctl.engines.torch.translate.table import (
    Operands,
    Translated,
    argument,
    entry_for,
)
from bnctl.graph import ops


@entry_for(
    "clone.default",
    "contiguous.default",
    "alias.default",
    "detach.default",
    "lift_fresh.default",
    "dropout.default",
    "feature_dropout.default",
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    in_training = "dropout" in call.op and argument(call, 2)
    return None if in_training else Translated(ops.Identity())


@entry_for(
    *[
        "reshape.default",
        "view.default",
        "_unsafe_view.default",
        "flatten.using_ints",
        "unflatten.int",
        "unsqueeze.default",
    ],
    *["squeeze.default", "squeeze.dim", "squeeze.dims"],
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Reshape())


@entry_for("view_as.default", "reshape_as.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Reshape(), reads=(0,))


@entry_for(
    *[
        "zeros_like.default",
        "ones_like.default",
        "empty_like.default",
        "full_like.default",
        "rand_like.default",
        "randn_like.default",
    ],
    *["new_zeros.default", "new_ones.default", "new_empty.default", "new_full.default"],
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Opaque(call.op), reads=())


@entry_for("permute.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axes = argument(call, 1)
    return Translated(ops.Permute(tuple(a % len(axes) for a in axes)))


@entry_for("transpose.int", "swapaxes.default", "t.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(argument(call, 0)))
    if rank < 2:
        return Translated(ops.Identity())
    one, two = (argument(call, 1, 0) % rank, argument(call, 2, 1) % rank)
    axes = list(range(rank))
    axes[one], axes[two] = two, one
    return Translated(ops.Permute(tuple(axes)))


@entry_for("movedim.int")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(argument(call, 0)))
    order = [a for a in range(rank) if a != argument(call, 1) % rank]
    order.insert(argument(call, 2) % rank, argument(call, 1) % rank)
    return Translated(ops.Permute(tuple(order)))


@entry_for("cat.default", "concat.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    parts = argument(call, 0)
    if any(operands.constant(part) is not None for part in parts) or len({len(operands.shape(p)) for p in parts}) != 1:
        return None
    return Translated(ops.Concat(argument(call, 1, 0, "dim")))


@entry_for("chunk.default", "split.Tensor", "split_with_sizes.default", "split.sizes")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis = argument(call, 2, 0, "dim")
    sizes = [operands.shape(Ref(v))[axis] for v in call.outputs]
    return Translated(ops.Slice(axis, tuple(accumulate([0, *sizes[:-1]]))))


@entry_for("slice.Tensor")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis, start = argument(call, 1, 0), argument(call, 2) or 0
    size = operands.shape(argument(call, 0))[axis]
    return (
        Translated(ops.Slice(axis, (max(start + size, 0) if start < 0 else min(start, size),)))
        if argument(call, 4, 1) == 1
        else None
    )


@entry_for("narrow.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return (
        Translated(ops.Slice(argument(call, 1), (argument(call, 2),)))
        if isinstance(argument(call, 2), int) and argument(call, 2) >= 0
        else None
    )
