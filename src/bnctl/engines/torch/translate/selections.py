"""Operators that take elements of their input: slices, splits, indices, flips, repeats, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from bnctl.engines.torch.record import OpCall, Ref
from bnctl.engines.torch.translate.table import TABLE, Operands, Translated, argument, entry_for
from bnctl.graph import ops


def _along(call: OpCall, operands: Operands, axis: int, positions: slice | Sequence[int]) -> Translated:
    """One part along one axis."""
    shape = operands.shape(argument(call, 0))
    taken = range(shape[axis])[positions] if isinstance(positions, slice) else positions
    return Translated(ops.Select(({axis % len(shape): tuple(taken)},)))


def _splits(axis: Any) -> Any:
    """An entry for parts one behind the other, whose sizes are those of the outputs."""

    def entry(call: OpCall, operands: Operands) -> Translated:
        rank = len(operands.shape(argument(call, 0)))
        along = axis(call, rank) % rank
        return Translated(ops.Select.split(along, [operands.shape(Ref(v))[along] for v in call.outputs]))

    return entry


for _name in (
    *("chunk.default", "unsafe_chunk.default", "split.Tensor", "unsafe_split.Tensor", "split.sizes"),
    *("split_with_sizes.default", "unsafe_split_with_sizes.default"),
    *("tensor_split.sections", "tensor_split.indices"),
):
    TABLE[f"aten.{_name}"] = _splits(lambda call, rank: argument(call, 2, 0, "dim"))
for _overload in ("int", "array"):
    TABLE[f"aten.hsplit.{_overload}"] = _splits(lambda call, rank: 0 if rank == 1 else 1)
    TABLE[f"aten.vsplit.{_overload}"] = _splits(lambda call, rank: 0)
    TABLE[f"aten.dsplit.{_overload}"] = _splits(lambda call, rank: 2)


@entry_for("slice.Tensor")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis, start, end, step = (argument(call, i, default) for i, default in ((1, 0), (2, None), (3, None), (4, 1)))
    return _along(call, operands, axis, slice(start, end, step))


@entry_for("narrow.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis, start, length = (argument(call, i) for i in (1, 2, 3))
    if not isinstance(start, int):
        return None
    start %= max(operands.shape(argument(call, 0))[axis], 1)
    return _along(call, operands, axis, slice(start, start + length))


@entry_for("select.int")
def _(call: OpCall, operands: Operands) -> Translated | None:
    shape = operands.shape(argument(call, 0))
    axis, index = argument(call, 1) % len(shape), argument(call, 2)
    return Translated(ops.Select(({axis: (index % shape[axis],)},), dropped=(axis,)))


@entry_for("unbind.int")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis = argument(call, 1, 0, "dim") % len(operands.shape(argument(call, 0)))
    return Translated(ops.Select(tuple({axis: (i,)} for i in range(len(call.outputs))), dropped=(axis,)))


def _indexed(call: OpCall, operands: Operands, axis: int, index: Any) -> Translated | None:
    positions, size = operands.constant(index), operands.shape(argument(call, 0))[axis]
    if positions is None or positions.ndim != 1 or not operands.is_data(argument(call, 0)):
        return None
    return _along(call, operands, axis, [int(i) % size for i in positions])


@entry_for("index_select.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _indexed(call, operands, argument(call, 1), argument(call, 2))


@entry_for("index.Tensor")
def _(call: OpCall, operands: Operands) -> Translated | None:
    given = [(axis, index) for axis, index in enumerate(argument(call, 1)) if index is not None]
    return _indexed(call, operands, *given[0]) if len(given) == 1 else None


@entry_for("flip.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    shape = operands.shape(argument(call, 0))
    axes = [a % len(shape) for a in argument(call, 1, (), "dims")]
    return Translated(ops.Select(({a: tuple(reversed(range(shape[a]))) for a in axes},)))


@entry_for("roll.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    shape = operands.shape(argument(call, 0))
    shifts, axes = argument(call, 1, (), "shifts"), [a % len(shape) for a in argument(call, 2, (), "dims")]
    if len(set(axes)) != len(shifts):  # without axes, or along one of them twice
        return None
    return Translated(
        ops.Select(({a: tuple(np.roll(range(shape[a]), n).tolist()) for a, n in zip(axes, shifts, strict=True)},))
    )


@entry_for("expand.default", "broadcast_to.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _expanded(operands.shape(argument(call, 0)), operands.shape(Ref(call.outputs[0])))


@entry_for("expand_as.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    found = _expanded(operands.shape(argument(call, 0)), operands.shape(Ref(call.outputs[0])))
    return Translated(found.op, reads=(0,)) if found and operands.is_data(argument(call, 0)) else None


def _expanded(old: tuple[int, ...], new: tuple[int, ...]) -> Translated | None:
    if len(old) != len(new):
        return None
    return Translated(ops.Select(({a: (0,) * n for a, (m, n) in enumerate(zip(old, new, strict=True)) if m != n},)))


@entry_for("repeat.default", "tile.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    shape, times = operands.shape(argument(call, 0)), argument(call, 1)
    if len(times) > len(shape):
        return None
    times = (*[1] * (len(shape) - len(times)), *times)
    return Translated(ops.Select(({a: (*range(shape[a]),) * n for a, n in enumerate(times) if n != 1},)))


@entry_for("repeat_interleave.self_int")
def _(call: OpCall, operands: Operands) -> Translated | None:
    times, axis = argument(call, 1), argument(call, 2, None, "dim")
    if axis is None:
        return None
    return _along(call, operands, axis, np.repeat(range(operands.shape(argument(call, 0))[axis]), times).tolist())


_MODES: dict[str, Literal["reflect", "edge", "wrap"]] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _padded(call: OpCall, operands: Operands, mode: str, value: float | None = 0.0) -> Translated | None:
    shape = operands.shape(argument(call, 0))
    flat = tuple(argument(call, 1))
    pairs = tuple(zip(flat[::2], flat[1::2], strict=True))[::-1]  # torch counts them from the last axis
    pads = ((0, 0),) * (len(shape) - len(pairs)) + pairs
    axes = [(axis, pair) for axis, pair in enumerate(pads) if any(pair)]
    if all(n <= 0 for n in flat):
        return Translated(
            ops.Select(({a: tuple(range(shape[a])[-before : shape[a] + behind]) for a, (before, behind) in axes},))
        )
    if any(n < 0 for n in flat):
        return None
    if mode == "constant":
        return Translated(ops.ConstantPad(pads, value))
    return Translated(
        ops.Select(({a: tuple(np.pad(np.arange(shape[a]), pair, _MODES[mode]).tolist()) for a, pair in axes},))
    )


@entry_for("pad.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    # Zero is what the operator pads with by itself; any other number may depend on the input.
    zero = (argument(call, 3, None, "value") or 0) == 0
    return _padded(call, operands, argument(call, 2, "constant", "mode"), 0.0 if zero else None)


@entry_for("constant_pad_nd.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _padded(call, operands, "constant", 0.0 if argument(call, 2, 0) == 0 else None)


@entry_for("_pad_circular.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _padded(call, operands, "circular")


for _n in (1, 2, 3):
    TABLE[f"aten.reflection_pad{_n}d.default"] = lambda call, operands: _padded(call, operands, "reflect")
    TABLE[f"aten.replication_pad{_n}d.default"] = lambda call, operands: _padded(call, operands, "replicate")
