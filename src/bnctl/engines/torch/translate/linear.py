"""Linear operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bnctl.codes import Obstacle
from bnctl.engines.torch.record import OpCall, Ref
from bnctl.engines.torch.translate.table import (
    Operands,
    Translated,
    any_nonzero,
    argument,
    entry_for,
)
from bnctl.graph import ops
from bnctl.graph.einsum import contraction
from bnctl.graph.window import Window


def _linear(
    op: ops.LinearOp, weight: Any, bias: Any, call: OpCall, operands: Operands, *, room: bool = True
) -> Translated | None:
    slot = operands.weight(weight, call)
    if slot is None or slot.shape is None or (bias is not None and operands.constant(bias) is None):
        return None
    bias_slot = operands.bias(bias, slot, call, op.spatial) if room or bias is not None else None
    _, channels = op.layout.channels(slot.shape)
    if bias is not None and bias_slot is not None and bias_slot.size != channels:
        bias_slot = replace(
            bias_slot, obstacle=Obstacle("BN118", f"{bias_slot.key} is one number for several channels")
        )
    return Translated(op, slot, bias_slot)


def _conv(call: OpCall, operands: Operands, *, padding: int, groups: int, transposed: bool) -> Translated | None:
    weight = argument(call, 1)
    spatial = len(operands.shape(weight)) - 2
    layout = ops.WeightLayout(groups, out_first=not transposed)
    padded = any_nonzero(argument(call, padding, 0))
    window = None if transposed else _window(call, padding, operands.shape(weight)[2:])
    return _linear(
        ops.Conv(layout, spatial=spatial, transposed=transposed, padded=padded, window=window),
        weight,
        argument(call, 2),
        call,
        operands,
    )


def _window(call: OpCall, padding: int, kernel: tuple[int, ...]) -> Window:
    """``conv(x, weight, bias, stride, padding, dilation)``; "same" puts the odd zero behind."""
    spatial = len(kernel)
    stride, dilation = _sizes(argument(call, padding - 1, 1), spatial), _sizes(argument(call, padding + 1, 1), spatial)
    pads = argument(call, padding, 0)
    if pads == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return Window(stride, dilation, tuple(n // 2 for n in total), tuple(n - n // 2 for n in total))
    both = _sizes(0 if pads == "valid" else pads, spatial)
    return Window(stride, dilation, both, both)


def _sizes(given: Any, spatial: int) -> tuple[int, ...]:
    """One number per axis, however it was given."""
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    return tuple(numbers * spatial if len(numbers) == 1 else numbers)


@entry_for(
    "conv1d.default",
    "conv2d.default",
    "conv3d.default",
    "conv1d.padding",
    "conv2d.padding",
    "conv3d.padding",
)
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _conv(call, operands, padding=4, groups=argument(call, 6, 1), transposed=False)


@entry_for("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _conv(call, operands, padding=4, groups=argument(call, 6, 1), transposed=True)


@entry_for("convolution.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _conv(call, operands, padding=4, groups=argument(call, 8, 1), transposed=argument(call, 6))


@entry_for("linear.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    if len(operands.shape(argument(call, 1))) != 2:
        return None
    return _linear(ops.Linear(ops.WeightLayout()), argument(call, 1), argument(call, 2), call, operands)


@entry_for("matmul.default", "mm.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    """``x W`` or ``W x`` of a stored matrix, or a product of two values."""
    left, right = argument(call, 0), argument(call, 1)
    if operands.is_data(left) and operands.is_data(right):
        return Translated(ops.MatMul())
    if operands.is_data(left):
        return _product(ops.Linear(ops.WeightLayout(out_first=False)), right, call, operands)
    last = len(operands.shape(right)) < 2
    return _product(ops.Linear(ops.WeightLayout(), spatial=0 if last else 1), left, call, operands)


@entry_for("einsum.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    """A value times a stored matrix (``bnc,cd->bnd``), the channels of which stay where they are."""
    factors = argument(call, 1)
    stored = [i for i, factor in enumerate(factors) if not operands.is_data(factor)]
    op = contraction(argument(call, 0), stored[0]) if len(factors) == 2 and len(stored) == 1 else None
    return None if op is None else _product(op, factors[stored[0]], call, operands)


def _product(op: ops.Linear, weight: Any, call: OpCall, operands: Operands) -> Translated | None:
    return _linear(op, weight, None, call, operands) if len(operands.shape(weight)) == 2 else None


@entry_for("bmm.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    both = operands.is_data(argument(call, 0)) and operands.is_data(argument(call, 1))
    return Translated(ops.MatMul()) if both else None


@entry_for("scaled_dot_product_attention.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    """The weights of a row sum to one; but not with dropout, and not in a row that a mask leaves empty."""
    data = all(operands.is_data(argument(call, i)) for i in range(3))
    plain = argument(call, 3, None, "attn_mask") is None and not argument(call, 4, 0.0, "dropout_p")
    return Translated(ops.Attention()) if data and plain else None


@entry_for("addmm.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    if beta == 0 or (isinstance(argument(call, 1), Ref) and operands.constant(argument(call, 1)) is not None):
        return None
    op = ops.Linear(ops.WeightLayout(out_first=False), weight_factor=float(alpha), bias_factor=float(beta))
    return _linear(op, argument(call, 2), argument(call, 0), call, operands)


@entry_for("embedding.default")
def _(call: OpCall, operands: Operands) -> Translated | None:
    return _linear(
        ops.Embedding(ops.WeightLayout(out_first=False)), argument(call, 0), None, call, operands, room=False
    )
