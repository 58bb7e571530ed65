"""Translation of operators that act on each element: BatchNormalization, arithmetic with constants, activations; and of normalisations."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.codes import Obstacle
from bnctl.engines.onnx.statistics import Statistics
from bnctl.engines.onnx.translated import Place, Rule, Scope, Translated, axis_attribute, flag, input_of
from bnctl.graph import ops
from bnctl.graph.affine import AffineMap
from bnctl.numerics.batchnorm import affine_of

Array = NDArray[np.float64]

_ACTIVATIONS = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log Mish PRelu "
    "Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu LogSoftmax Hardmax"
)
_NORMS = "InstanceNormalization LayerNormalization GroupNormalization RMSNormalization LpNormalization MeanVarianceNormalization LRN"
_WITH_SCALE_AND_BIAS = {"InstanceNormalization", "LayerNormalization", "GroupNormalization"}
_GROUP_NORM_PER_CHANNEL = 21
"""The opset from which GroupNormalization has a scale per channel; before, it had one per group."""


def _batch_norm(node: ir.Node, scope: Scope) -> Translated:
    obstacle = _batch_norm_obstacle(node, scope)
    if obstacle is not None:
        return Translated(ops.Norm(node.op_type, obstacle))
    statistics = Statistics.read(node, scope.constants)
    rank = scope.rank(node.inputs[0])
    assert statistics is not None and rank is not None
    try:
        scale, shift = affine_of(statistics.mean, statistics.var, statistics.eps, statistics.gamma, statistics.beta)
    except ValueError as error:
        return Translated(ops.Norm(node.op_type, Obstacle("BN115", str(error))))
    return Translated(ops.Affine(AffineMap.along(1, rank, scale, shift), norm=True), Place(node, 1), Place(node, 2))


def _batch_norm_obstacle(node: ir.Node, scope: Scope) -> Obstacle | None:
    """Opset 14 and later have ``training_mode``; from 7 to 13, further outputs mean training; before 9, ``spatial=0`` has statistics for each position."""
    if flag(node, "training_mode") or any(v.name for v in node.outputs[1:]):
        return Obstacle("BN105", "it is in training mode")
    parameters = node.inputs[1:5]
    computed = (scope.constants.obstacle(v) for v in parameters if v is not None)
    obstacle = next((o for o in computed if o is not None), None)
    if obstacle is not None:
        return obstacle
    if Statistics.read(node, scope.constants) is None:
        return Obstacle("BN108", "its parameters cannot be evaluated")
    if not flag(node, "spatial", default=True):
        return Obstacle("BN116", "its statistics vary over positions (spatial=0)")
    rank = scope.rank(node.inputs[0])
    if rank is None or rank < 2:
        state = "has one axis, and no channels" if rank == 1 else "is of no known shape"
        return Obstacle("BN116", f"{getattr(node.inputs[0], 'name', 'its input')} {state}")
    return None


def _arithmetic(node: ir.Node, scope: Scope) -> Translated | None:
    """Add, Sub, Mul, Div: an affine where one operand is constant, a sum where none is."""
    first, second = node.inputs
    if first is None or second is None or not scope.of(node.outputs[0]).floating:
        return None
    constants = [v in scope.constants for v in (first, second)]
    if not any(constants):
        return _OF_TWO_VALUES.get(node.op_type)
    if all(constants):
        return None
    c, x = scope.constant(node, constants.index(True)), node.inputs[constants.index(False)]
    shape = scope.shape(x)
    if c is None or shape is None or not _fits(c.shape, shape):
        return None
    pair = _scale_and_shift(node.op_type, np.asarray(c, np.float64), constant_first=constants[0])
    return None if pair is None else Translated(ops.Affine(AffineMap.broadcast(len(shape), *pair)))


_OF_TWO_VALUES = {
    "Add": Translated(ops.Sum((1, 1))),
    "Sub": Translated(ops.Sum((1, -1))),
    "Mul": Translated(ops.Product()),
}


def _fits(constant: tuple[int, ...], shape: tuple[int | str | None, ...]) -> bool:
    """Whether a constant broadcasts against a value without giving it another shape: sizes are aligned at the last axis."""
    if len(constant) > len(shape):
        return False
    return all(n in (1, size) for n, size in zip(reversed(constant), reversed(shape), strict=False))


def _scale_and_shift(op_type: str, c: Array, *, constant_first: bool) -> tuple[Array, Array] | None:
    one, zero = np.ones(()), np.zeros(())
    if op_type == "Mul":
        return c, zero
    if op_type == "Add":
        return one, c
    if op_type == "Sub":
        return (-one, c) if constant_first else (one, -c)
    if constant_first or np.any(c == 0):
        return None
    return one / c, zero


def _negation(node: ir.Node, scope: Scope) -> Translated | None:
    rank = scope.rank(node.inputs[0])
    return None if rank is None else Translated(ops.Affine(AffineMap.broadcast(rank, -np.ones(()), np.zeros(()))))


def _sum(node: ir.Node, scope: Scope) -> Translated | None:
    """Sum of any number of inputs; constants that are added to one value are an affine."""
    shape = scope.shape(node.outputs[0])
    constants = [i for i, v in enumerate(node.inputs) if v in scope.constants]
    branches = len(node.inputs) - len(constants)
    if not constants:
        return Translated(ops.Identity() if branches == 1 else ops.Sum((1,) * branches))
    values = [scope.constant(node, i) for i in constants]
    data = next((v for v in node.inputs if v not in scope.constants), None)
    if branches != 1 or shape is None or scope.shape(data) != shape or any(c is None for c in values):
        return None
    shift = sum((np.asarray(c, np.float64) for c in values), np.zeros(()))
    return (
        Translated(ops.Affine(AffineMap.broadcast(len(shape), np.ones(()), shift)))
        if _fits(shift.shape, shape)
        else None
    )


def _extremum(node: ir.Node, scope: Scope) -> Translated | None:
    """The larger or smaller of values; a constant among them makes it an activation, of which nothing is known."""
    data = all(v not in scope.constants for v in node.inputs)
    return Translated(ops.Extremum("max" if node.op_type == "Max" else "min")) if data else None


def _power(node: ir.Node, scope: Scope) -> Translated | None:
    exponent = scope.constant(node, 1)
    return Translated(ops.Activation("pow")) if exponent is not None and exponent.size == 1 else None


def _activation(node: ir.Node, scope: Scope) -> Translated:
    return Translated(ops.Activation(_snake(node.op_type)))


def _softmax(node: ir.Node, scope: Scope) -> Translated:
    """Before opset 13, all axes from the given one on are one; after it, -1 is the default."""
    rank, new = scope.rank(node.inputs[0]), scope.opset >= 13
    axis = axis_attribute(node, -1 if new else 1)
    if not new and (rank is None or axis % rank != rank - 1):
        return Translated(ops.Activation("softmax"))
    return Translated(ops.Activation("softmax", axis))


def _norm(node: ir.Node, scope: Scope) -> Translated:
    """Those that normalise by their input, with their scale and bias where these are vectors along the axis of the channels."""
    last = node.op_type == "LayerNormalization"
    per_group = node.op_type == "GroupNormalization" and scope.opset < _GROUP_NORM_PER_CHANNEL
    if node.op_type not in _WITH_SCALE_AND_BIAS or per_group or (last and axis_attribute(node, -1) != -1):
        return Translated(ops.Norm(node.op_type))
    slots = (Place(node, 1), Place(node, 2)) if input_of(node, 1) is not None and input_of(node, 2) is not None else ()
    return Translated(ops.Norm(node.op_type, axis=-1 if last else 1), *slots)


def _snake(name: str) -> str:
    """``LogSoftmax`` to ``log_softmax``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "Neg": _negation,
    "Sum": _sum,
    **dict.fromkeys(("Max", "Min"), _extremum),
    "Pow": _power,
    **dict.fromkeys(_ACTIVATIONS.split(), _activation),
    "Softmax": _softmax,
    **dict.fromkeys(_NORMS.split(), _norm),
}
