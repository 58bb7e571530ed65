"""Operators that only move elements."""

from __future__ import annotations

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
        "ravel.default",
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


@entry_for("transpose.int", "swapaxes.default", "swapdims.default", "t.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(argument(call, 0)))
    if rank < 2:
        return Translated(ops.Identity())
    one, two = (argument(call, 1, 0) % rank, argument(call, 2, 1) % rank)
    axes = list(range(rank))
    axes[one], axes[two] = two, one
    return Translated(ops.Permute(tuple(axes)))


@entry_for("movedim.int", "moveaxis.int")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(argument(call, 0)))
    order = [a for a in range(rank) if a != argument(call, 1) % rank]
    order.insert(argument(call, 2) % rank, argument(call, 1) % rank)
    return Translated(ops.Permute(tuple(order)))


@entry_for("movedim.intlist", "moveaxis.intlist")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(argument(call, 0)))
    source, target = ([a % rank for a in argument(call, i)] for i in (1, 2))
    rest = iter(a for a in range(rank) if a not in source)
    return Translated(ops.Permute(tuple(source[target.index(a)] if a in target else next(rest) for a in range(rank))))


@entry_for("pixel_shuffle.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(_pixel_shuffle(operands.shape(argument(call, 0)), argument(call, 1)))


@entry_for("pixel_unshuffle.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(_pixel_shuffle(operands.shape(Ref(call.outputs[0])), argument(call, 1)).inverse)


def _pixel_shuffle(shape: tuple[int, ...], block: int) -> ops.Rearrange:
    return ops.Rearrange.depth_to_space(shape, block, depth_first=False)


@entry_for("channel_shuffle.default", "native_channel_shuffle.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    samples, channels, *space = operands.shape(argument(call, 0))
    groups, rank = argument(call, 1), len(space)
    split = ((samples,), (groups, channels // groups), *((n,) for n in space))
    return Translated(ops.Rearrange(split, (0, 2, 1, *range(3, 3 + rank)), (1, 2, *[1] * rank)))


def _concat(call: OpCall, operands: Operands, axis: int, *, stacked: bool = False) -> Translated | None:
    given = argument(call, 0)
    parts = tuple(None if operands.is_data(part) else operands.constant(part) for part in given)
    ranks = {len(operands.shape(part)) for part in given}
    if len(ranks) != 1:  # cat takes an empty tensor of one axis with any other
        return None
    if any(part is None and not operands.is_data(item) for part, item in zip(parts, given, strict=True)):
        return None
    return Translated(ops.Concat(axis % (ranks.pop() + stacked), parts, stacked))


@entry_for("cat.default", "concat.default", "concatenate.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _concat(call, operands, argument(call, 1, 0, "dim"))


@entry_for("hstack.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _concat(call, operands, 0 if len(operands.shape(argument(call, 0)[0])) == 1 else 1)


@entry_for("stack.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _concat(call, operands, argument(call, 1, 0, "dim"), stacked=True)
