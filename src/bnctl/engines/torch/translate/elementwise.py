"""Operators on single elements: constant affines, sums of branches, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnctl.engines.torch.record import OpCall
from bnctl.engines.torch.translate.table import (
    TABLE,
    Array,
    Operands,
    Translated,
    argument,
    entry_for,
)
from bnctl.graph import ops
from bnctl.graph.affine import AffineMap


def _affine(
    call: OpCall, operands: Operands, combine: Callable[[Array], tuple[Any, Any]], data: int = 0
) -> Translated | None:
    constant = operands.constant(argument(call, 1 - data))
    shape = operands.shape(argument(call, data))
    if constant is None or not operands.is_data(argument(call, data)):
        return None
    if constant.ndim > len(shape) or np.broadcast_shapes(constant.shape, shape) != shape:
        return None
    scale, shift = np.broadcast_arrays(*combine(constant))
    return Translated(ops.Affine(AffineMap.broadcast(len(shape), scale, shift)))


def _two_values(call: OpCall, operands: Operands) -> bool:
    return operands.is_data(argument(call, 0)) and operands.is_data(argument(call, 1))


def _sum(call: OpCall, operands: Operands, first: int, second: int) -> Translated | None:
    whole = _two_values(call, operands) and call.kwargs.get("alpha", 1) == 1
    return Translated(ops.Sum((first, second))) if whole else None


@entry_for("add.Tensor", "add.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    alpha = float(call.kwargs.get("alpha", 1))
    for data in (0, 1):
        factors = (1.0, alpha) if data == 0 else (alpha, 1.0)
        found = _affine(call, operands, lambda c, f=factors: (np.float64(f[0]), f[1] * c), data)  # type: ignore[misc]
        if found:
            return found
    return _sum(call, operands, 1, 1)


def _difference(call: OpCall, operands: Operands, *, rest: int) -> Translated | None:
    """One argument minus the one number ``rest``."""
    if call.kwargs.get("alpha", 1) != 1:
        return None
    signs = (-1, 1) if rest == 0 else (1, -1)
    return (
        _affine(call, operands, lambda c: (np.float64(1), -c), data=1 - rest)
        or _affine(call, operands, lambda c: (np.float64(-1), c), data=rest)
        or _sum(call, operands, *signs)
    )


@entry_for("sub.Tensor", "sub.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _difference(call, operands, rest=1)


@entry_for("rsub.Tensor", "rsub.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _difference(call, operands, rest=0)


@entry_for("mul.Tensor", "mul.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    for data in (0, 1):
        found = _affine(call, operands, lambda c: (c, np.zeros_like(c)), data)
        if found:
            return found
    return Translated(ops.Product()) if _two_values(call, operands) else None


@entry_for("maximum.default", "max.other")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Extremum("max")) if _two_values(call, operands) else None


@entry_for("minimum.default", "min.other")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Extremum("min")) if _two_values(call, operands) else None


@entry_for("div.Tensor", "div.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    constant = operands.constant(argument(call, 1))
    if constant is None or np.any(constant == 0):
        return None
    return _affine(call, operands, lambda c: (1 / c, np.zeros_like(c)))


@entry_for("neg.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(argument(call, 0)))
    return Translated(ops.Affine(AffineMap.broadcast(rank, np.float64(-1), np.float64(0))))  # type: ignore[arg-type]


_ACTIVATIONS = (
    "relu relu6 hardtanh silu gelu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu "
    "celu mish softplus prelu threshold rrelu log_sigmoid softshrink hardshrink clamp "
    "clamp_min clamp_max abs exp log sqrt pow square log_softmax "
    "_log_softmax"
).split()


def _activation(call: OpCall, operands: Operands) -> Translated:
    return Translated(ops.Activation(call.op.split(".")[1].strip("_")))


@entry_for("softmax.int", "_softmax.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis = argument(call, 1)
    return Translated(ops.Activation("softmax", axis if isinstance(axis, int) else None))


for _name in _ACTIVATIONS:
    for _overload in ("default", "Tensor_Scalar", "int"):
        TABLE[f"aten.{_name}.{_overload}"] = _activation
