"""Normalisation."""

from __future__ import annotations

from bnctl.codes import Obstacle
from bnctl.engines.torch.record import OpCall
from bnctl.engines.torch.translate.table import (
    Operands,
    Translated,
    argument,
    entry_for,
)
from bnctl.graph import ops
from bnctl.graph.affine import AffineMap
from bnctl.numerics.batchnorm import affine_of


def _batch_norm(call: OpCall, operands: Operands, *, batch_statistics: bool, eps: float) -> Translated | None:
    mean, var = operands.constant(argument(call, 3)), operands.constant(argument(call, 4))
    if batch_statistics:
        taken = ops.Norm("batch norm", Obstacle("BN105", "mean and variance are taken from the input"))
        return Translated(taken, operands.weight(argument(call, 1), call), operands.weight(argument(call, 2), call))
    if mean is None or var is None:
        return Translated(
            ops.Norm("batch norm", Obstacle("BN109", "its statistics are not stored in a module of the model"))
        )
    gamma, beta = argument(call, 1), argument(call, 2)
    rank = len(operands.shape(argument(call, 0)))
    try:
        scale, shift = affine_of(mean, var, eps, operands.constant(gamma), operands.constant(beta))
    except ValueError as error:
        return Translated(ops.Norm("batch norm", Obstacle("BN115", str(error))))
    slots = (operands.weight(gamma, call), operands.weight(beta, call))
    return Translated(ops.Affine(AffineMap.along(1, rank, scale, shift), norm=True, axis=1), *slots)


@entry_for(
    "batch_norm.default",
    "native_batch_norm.default",
    "instance_norm.default",
    "cudnn_batch_norm.default",
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _batch_norm(call, operands, batch_statistics=bool(argument(call, 5)), eps=argument(call, 7))


@entry_for("_native_batch_norm_legit_no_training.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _batch_norm(call, operands, batch_statistics=False, eps=argument(call, 6))


@entry_for("group_norm.default", "layer_norm.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    kind = call.op.split(".")[1]
    gamma, beta = argument(call, 2, None, "weight"), argument(call, 3, None, "bias")
    op = ops.Norm(kind, axis=1 if kind == "group_norm" else -1)
    return Translated(op, operands.weight(gamma, call), operands.weight(beta, call))


@entry_for("native_layer_norm.default", "native_group_norm.default", "rms_norm.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Norm(call.op.split(".")[1]))
