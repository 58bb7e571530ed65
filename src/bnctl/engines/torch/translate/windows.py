"""Operators on windows over space."""

from __future__ import annotations

from bnctl.engines.torch.record import OpCall
from bnctl.engines.torch.translate.table import (
    TABLE,
    Operands,
    Translated,
    any_nonzero,
    argument,
    entry_for,
)
from bnctl.graph import ops


@entry_for("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    counted = any_nonzero(argument(call, 3, 0)) and argument(call, 5, True)
    return (
        None if counted or argument(call, 6) is not None else Translated(ops.Average(int(call.op.split("d.")[0][-1])))
    )


@entry_for("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Average(int(call.op.split("d.")[0][-1])))


@entry_for("mean.dim")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axes = argument(call, 1)
    return Translated(ops.Mean(tuple(axes), bool(argument(call, 2, False, "keepdim")))) if axes else None


def _pool(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.MaxPool(int(call.op.split(".")[1].partition("d_")[0].rstrip("d")[-1])))


for _name in ("max_pool{}d.default", "max_pool{}d_with_indices.default", "adaptive_max_pool{}d.default"):
    for _n in (1, 2, 3):
        TABLE["aten." + _name.format(_n)] = _pool


def _weights_sum_to_one(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Average(len(operands.shape(argument(call, 0))) - 2))


for _name in [
    "nearest1d",
    "nearest2d",
    "nearest3d",
    "_nearest_exact2d",
    "linear1d",
    "bilinear2d",
    "bicubic2d",
    "trilinear3d",
]:
    for _overload in ("default", "vec"):
        TABLE[f"aten.upsample_{_name}.{_overload}"] = _weights_sum_to_one
for _n in (1, 2, 3):
    for _name in ("reflection", "replication"):
        TABLE[f"aten.{_name}_pad{_n}d.default"] = _weights_sum_to_one


@entry_for("pad.default", "constant_pad_nd.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    if argument(call, 2, "constant") in {"reflect", "replicate", "circular"}:
        padded_axes = len(argument(call, 1)) // 2
        return Translated(ops.Average(padded_axes))
    return Translated(ops.ConstantPad())
