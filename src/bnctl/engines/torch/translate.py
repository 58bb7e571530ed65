"""The table from torch operators to the vocabulary of the normalised graph: one small entry per operator.

An operator that is not in the table, or whose arguments do not fit, is opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bnctl.codes import Obstacle
from bnctl.engines.torch.record import OpCall, Ref
from bnctl.graph import ops
from bnctl.graph.affine import AffineMap
from bnctl.graph.graph import Slot
from bnctl.numerics.batchnorm import affine_of

Array = NDArray[np.float64]


class Operands(Protocol):
    """What an entry may ask about the arguments of a call."""

    def constant(self, item: Any) -> Array | None:
        """The value of an argument that does not depend on the model's input."""

    def shape(self, item: Any) -> tuple[int, ...]:
        """Sizes of a tensor argument."""

    def weight(self, item: Any, call: OpCall) -> Slot | None:
        """The slot of a weight; None where it depends on the model's input."""

    def bias(self, item: Any, weight: Slot | None, call: OpCall) -> Slot | None:
        """The slot of a bias, empty where one can be added; None where there is no room for one."""


@dataclass(frozen=True)
class Translated:
    """An operator in normalised terms, with the slots of its parameters.

    ``reads`` are the positions of the arguments whose *elements* are read, where some tensors lend only their shape (``view_as``); None for all.
    """

    op: ops.Op
    weight: Slot | None = None
    bias: Slot | None = None
    reads: tuple[int, ...] | None = None


Entry = Callable[[OpCall, Operands], Translated | None]
_TABLE: dict[str, Entry] = {}

PARAMETER_ARGUMENTS: dict[str, tuple[int, ...]] = {}
"""Positions at which an operator reads parameters of its own: these are the slots."""


def translate(call: OpCall, operands: Operands) -> Translated | None:
    """Look the operator up; None where it is opaque."""
    entry = _TABLE.get(_base(call.op))
    return entry(call, operands) if entry else None


def _base(op: str) -> str:
    """``aten.relu_.default`` and ``aten.relu.default`` mean the same to the graph."""
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return f"{namespace}.{name}.{overload}"


def _entry(*names: str, parameters: tuple[int, ...] = ()) -> Callable[[Entry], Entry]:
    def register(entry: Entry) -> Entry:
        for name in names:
            _TABLE[f"aten.{name}"] = entry
            if parameters:
                PARAMETER_ARGUMENTS[f"aten.{name}"] = parameters
        return entry

    return register


def _arg(call: OpCall, position: int, default: Any = None, name: str = "") -> Any:
    return call.args[position] if position < len(call.args) else call.kwargs.get(name, default)


def _any_nonzero(padding: Any) -> bool:
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


# Linear operators


def _linear(
    op: ops.LinearOp, weight: Any, bias: Any, call: OpCall, operands: Operands, *, room: bool = True
) -> Translated | None:
    slot = operands.weight(weight, call)
    if slot is None or slot.shape is None or (bias is not None and operands.constant(bias) is None):
        return None
    bias_slot = operands.bias(bias, slot, call) if room or bias is not None else None
    _, channels = op.layout.channels(slot.shape)
    if bias is not None and bias_slot is not None and bias_slot.size != channels:
        bias_slot = replace(
            bias_slot, obstacle=Obstacle("BN118", f"{bias_slot.key} is one number for several channels")
        )
    return Translated(op, slot, bias_slot)


def _conv(call: OpCall, operands: Operands, *, padding: int, groups: int, transposed: bool) -> Translated | None:
    weight = _arg(call, 1)
    spatial = len(operands.shape(weight)) - 2
    layout = ops.WeightLayout(groups, out_first=not transposed)
    padded = _any_nonzero(_arg(call, padding, 0))
    return _linear(
        ops.Conv(layout, spatial=spatial, transposed=transposed, padded=padded), weight, _arg(call, 2), call, operands
    )


@_entry(
    "conv1d.default",
    "conv2d.default",
    "conv3d.default",
    "conv1d.padding",
    "conv2d.padding",
    "conv3d.padding",
    parameters=(1, 2),
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _conv(call, operands, padding=4, groups=_arg(call, 6, 1), transposed=False)


@_entry("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input", parameters=(1, 2))
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _conv(call, operands, padding=4, groups=_arg(call, 6, 1), transposed=True)


@_entry("convolution.default", parameters=(1, 2))
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _conv(call, operands, padding=4, groups=_arg(call, 8, 1), transposed=_arg(call, 6))


@_entry("linear.default", parameters=(1, 2))
def _(call: OpCall, operands: Operands) -> Translated | None:
    if len(operands.shape(_arg(call, 1))) != 2:
        return None
    return _linear(ops.Linear(ops.WeightLayout()), _arg(call, 1), _arg(call, 2), call, operands)


@_entry("matmul.default", "mm.default", parameters=(1,))
def _(call: OpCall, operands: Operands) -> Translated | None:
    if len(operands.shape(_arg(call, 1))) != 2:
        return None
    return _linear(ops.Linear(ops.WeightLayout(out_first=False)), _arg(call, 1), None, call, operands, room=False)


@_entry("addmm.default", parameters=(0, 2))
def _(call: OpCall, operands: Operands) -> Translated | None:
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    if beta == 0 or (isinstance(_arg(call, 1), Ref) and operands.constant(_arg(call, 1)) is not None):
        return None
    op = ops.Linear(ops.WeightLayout(out_first=False), weight_factor=float(alpha), bias_factor=float(beta))
    return _linear(op, _arg(call, 2), _arg(call, 0), call, operands)


@_entry("embedding.default", parameters=(0,))
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _linear(ops.Embedding(ops.WeightLayout(out_first=False)), _arg(call, 0), None, call, operands, room=False)


# Normalisation


def _batch_norm(call: OpCall, operands: Operands, *, batch_statistics: bool, eps: float) -> Translated | None:
    mean, var = operands.constant(_arg(call, 3)), operands.constant(_arg(call, 4))
    if batch_statistics:
        return Translated(ops.Norm("batch norm", Obstacle("BN105", "mean and variance are taken from the input")))
    if mean is None or var is None:
        return Translated(
            ops.Norm("batch norm", Obstacle("BN109", "its statistics are not stored in a module of the model"))
        )
    gamma, beta = _arg(call, 1), _arg(call, 2)
    rank = len(operands.shape(_arg(call, 0)))
    try:
        scale, shift = affine_of(mean, var, eps, operands.constant(gamma), operands.constant(beta))
    except ValueError as error:
        return Translated(ops.Norm("batch norm", Obstacle("BN115", str(error))))
    slots = (operands.weight(gamma, call), operands.weight(beta, call))
    return Translated(ops.Affine(AffineMap.along(1, rank, scale, shift), norm=True, axis=1), *slots)


@_entry(
    "batch_norm.default",
    "native_batch_norm.default",
    "instance_norm.default",
    "cudnn_batch_norm.default",
    parameters=(1, 2, 3, 4),
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _batch_norm(call, operands, batch_statistics=bool(_arg(call, 5)), eps=_arg(call, 7))


@_entry("_native_batch_norm_legit_no_training.default", parameters=(1, 2, 3, 4))
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _batch_norm(call, operands, batch_statistics=False, eps=_arg(call, 6))


@_entry(
    "group_norm.default",
    "layer_norm.default",
    "native_layer_norm.default",
    "native_group_norm.default",
    "rms_norm.default",
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Norm(call.op.split(".")[1]))


# Element by element


def _affine(
    call: OpCall, operands: Operands, combine: Callable[[Array], tuple[Any, Any]], data: int = 0
) -> Translated | None:
    constant = operands.constant(_arg(call, 1 - data))
    shape = operands.shape(_arg(call, data))
    if constant is None or not isinstance(_arg(call, data), Ref) or operands.constant(_arg(call, data)) is not None:
        return None
    if constant.ndim > len(shape) or np.broadcast_shapes(constant.shape, shape) != shape:
        return None
    scale, shift = np.broadcast_arrays(*combine(constant))
    return Translated(ops.Affine(AffineMap.broadcast(len(shape), scale, shift)))


def _sum(call: OpCall, operands: Operands, sign: int) -> Translated | None:
    first, second = _arg(call, 0), _arg(call, 1)
    both = (
        isinstance(first, Ref)
        and isinstance(second, Ref)
        and operands.constant(first) is None
        and operands.constant(second) is None
    )
    return Translated(ops.Sum(sign)) if both and call.kwargs.get("alpha", 1) == 1 else None


@_entry("add.Tensor", "add.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    alpha = float(call.kwargs.get("alpha", 1))
    for data in (0, 1):
        factors = (1.0, alpha) if data == 0 else (alpha, 1.0)
        found = _affine(call, operands, lambda c, f=factors: (np.float64(f[0]), f[1] * c), data)  # type: ignore[misc]
        if found:
            return found
    return _sum(call, operands, 1)


@_entry("sub.Tensor", "sub.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    if call.kwargs.get("alpha", 1) != 1:
        return None
    return (
        _affine(call, operands, lambda c: (np.float64(1), -c))
        or _affine(call, operands, lambda c: (np.float64(-1), c), data=1)
        or _sum(call, operands, -1)
    )


@_entry("mul.Tensor", "mul.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _affine(call, operands, lambda c: (c, np.zeros_like(c))) or _affine(
        call, operands, lambda c: (c, np.zeros_like(c)), data=1
    )


@_entry("div.Tensor", "div.Scalar")
def _(call: OpCall, operands: Operands) -> Translated | None:
    constant = operands.constant(_arg(call, 1))
    if constant is None or np.any(constant == 0):
        return None
    return _affine(call, operands, lambda c: (1 / c, np.zeros_like(c)))


@_entry("neg.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(_arg(call, 0)))
    return Translated(ops.Affine(AffineMap.broadcast(rank, np.float64(-1), np.float64(0))))  # type: ignore[arg-type]


_ACTIVATIONS = [
    "relu",
    "relu6",
    "hardtanh",
    "silu",
    "gelu",
    "sigmoid",
    "tanh",
    "hardswish",
    "hardsigmoid",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "mish",
    "softplus",
    "prelu",
    "threshold",
    "rrelu",
    "log_sigmoid",
    "softshrink",
    "hardshrink",
    "clamp",
    "clamp_min",
    "clamp_max",
    "abs",
    "exp",
    "log",
    "sqrt",
    "pow",
    "square",
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
]


def _activation(call: OpCall, operands: Operands) -> Translated:
    return Translated(ops.Activation(call.op.split(".")[1].strip("_")))


for _name in _ACTIVATIONS:
    for _overload in ("default", "Tensor_Scalar", "int"):
        _TABLE[f"aten.{_name}.{_overload}"] = _activation


# Shapes


@_entry(
    "clone.default",
    "contiguous.default",
    "alias.default",
    "detach.default",
    "lift_fresh.default",
    "dropout.default",
    "feature_dropout.default",
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    in_training = "dropout" in call.op and _arg(call, 2)
    return None if in_training else Translated(ops.Identity())


@_entry(
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


@_entry("view_as.default", "reshape_as.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Reshape(), reads=(0,))


@_entry(
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


@_entry("permute.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axes = _arg(call, 1)
    return Translated(ops.Permute(tuple(a % len(axes) for a in axes)))


@_entry("transpose.int", "swapaxes.default", "t.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(_arg(call, 0)))
    if rank < 2:
        return Translated(ops.Identity())
    one, two = (_arg(call, 1, 0) % rank, _arg(call, 2, 1) % rank)
    axes = list(range(rank))
    axes[one], axes[two] = two, one
    return Translated(ops.Permute(tuple(axes)))


@_entry("movedim.int")
def _(call: OpCall, operands: Operands) -> Translated | None:
    rank = len(operands.shape(_arg(call, 0)))
    order = [a for a in range(rank) if a != _arg(call, 1) % rank]
    order.insert(_arg(call, 2) % rank, _arg(call, 1) % rank)
    return Translated(ops.Permute(tuple(order)))


@_entry("cat.default", "concat.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    parts = _arg(call, 0)
    if any(operands.constant(part) is not None for part in parts) or len({len(operands.shape(p)) for p in parts}) != 1:
        return None
    return Translated(ops.Concat(_arg(call, 1, 0, "dim")))


@_entry("chunk.default", "split.Tensor", "split_with_sizes.default", "split.sizes")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis = _arg(call, 2, 0, "dim")
    sizes = [operands.shape(Ref(v))[axis] for v in call.outputs]
    return Translated(ops.Slice(axis, tuple(accumulate([0, *sizes[:-1]]))))


@_entry("slice.Tensor")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axis, start = _arg(call, 1, 0), _arg(call, 2) or 0
    size = operands.shape(_arg(call, 0))[axis]
    return (
        Translated(ops.Slice(axis, (max(start + size, 0) if start < 0 else min(start, size),)))
        if _arg(call, 4, 1) == 1
        else None
    )


@_entry("narrow.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return (
        Translated(ops.Slice(_arg(call, 1), (_arg(call, 2),)))
        if isinstance(_arg(call, 2), int) and _arg(call, 2) >= 0
        else None
    )


# Windows over space


@_entry("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    counted = _any_nonzero(_arg(call, 3, 0)) and _arg(call, 5, True)
    return None if counted or _arg(call, 6) is not None else Translated(ops.Average(int(call.op.split("d.")[0][-1])))


@_entry("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Average(int(call.op.split("d.")[0][-1])))


@_entry("mean.dim")
def _(call: OpCall, operands: Operands) -> Translated | None:
    axes = _arg(call, 1)
    return Translated(ops.Mean(tuple(axes), bool(_arg(call, 2, False, "keepdim")))) if axes else None


def _pool(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.MaxPool(int(call.op.split(".")[1].partition("d_")[0].rstrip("d")[-1])))


for _name in ("max_pool{}d.default", "max_pool{}d_with_indices.default", "adaptive_max_pool{}d.default"):
    for _n in (1, 2, 3):
        _TABLE["aten." + _name.format(_n)] = _pool


def _weights_sum_to_one(call: OpCall, operands: Operands) -> Translated | None:
    return Translated(ops.Average(len(operands.shape(_arg(call, 0))) - 2))


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
        _TABLE[f"aten.upsample_{_name}.{_overload}"] = _weights_sum_to_one
for _n in (1, 2, 3):
    for _name in ("reflection", "replication"):
        _TABLE[f"aten.{_name}_pad{_n}d.default"] = _weights_sum_to_one


@_entry("pad.default", "constant_pad_nd.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    if _arg(call, 2, "constant") in {"reflect", "replicate", "circular"}:
        padded_axes = len(_arg(call, 1)) // 2
        return Translated(ops.Average(padded_axes))
    return Translated(ops.ConstantPad())
