"""Operators on windows over space."""

from __future__ import annotations

import re

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
    partial = counted or argument(call, 6) is not None
    return Translated(ops.Average(_spatial(call), partial))


@entry_for(*(f"{private}adaptive_avg_pool{n}d.default" for n in (1, 2, 3) for private in ("", "_")))
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Average(_spatial(call)))


def _pool(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.MaxPool(_spatial(call)))


def _spatial(call: OpCall) -> int:
    """``aten.max_pool2d_with_indices.default`` works on two axes."""
    return int(re.findall(r"(\d)d", call.op)[0])


for _name in ("max_pool{}d.default", "max_pool{}d_with_indices.default", "adaptive_max_pool{}d.default"):
    for _n in (1, 2, 3):
        TABLE["aten." + _name.format(_n)] = _pool


def _interpolation(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Average(_spatial(call)))


for _name in (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
):
    for _overload in ("default", "vec"):
        TABLE[f"aten.{_name}.{_overload}"] = _interpolation


@entry_for("grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    zeros = argument(call, 3) == 0  # what lies outside counts as zero; other modes stay inside
    rank = len(operands.shape(argument(call, 0)))
    return Translated(ops.Average(rank - 2, zeros)) if operands.is_data(argument(call, 0)) else None


def _reduction(call: OpCall, operands: Operands) -> Translated | None:
    kind = call.op.split(".")[1].removeprefix("a")
    rank = len(operands.shape(argument(call, 0)))
    given = argument(call, 1, None, "dim")
    axes = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    if argument(call, 3, None, "dtype") is not None:
        return None
    # How many elements are added up depends on the size of the input, of which one example says nothing.
    return Translated(ops.Reduce(kind, tuple(a % rank for a in axes), bool(argument(call, 2, False, "keepdim"))))  # type: ignore[arg-type]


for _name in (
    "mean.dim",
    "mean.default",
    "sum.dim_IntList",
    "sum.default",
    "amax.default",
    "amin.default",
    "max.dim",
    "min.dim",
):
    TABLE[f"aten.{_name}"] = _reduction
