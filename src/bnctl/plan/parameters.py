"""New parameters for an edit, in float64, and the one cast to the layer's dtype."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import OverflowInFoldError
from bnctl.graph.affine import Array
from bnctl.graph.ops import LinearOp
from bnctl.numerics.absorb import WIDE, absorb_input, absorb_output, absorb_padded
from bnctl.plan.draft import Edit


def new_parameters(edit: Edit, weight: NDArray[Any], bias: Array | None) -> tuple[NDArray[Any], Array]:
    """Weight and bias after the edit.

    Args:
        edit: what is absorbed, in order.
        weight: the stored weight (or gamma of a normalisation layer), in its own type.
        bias: the stored bias (or beta), as float64; None where the slot is empty.

    Returns:
        Both computed in float64; a weight that is only scaled is cast to its own type once. The bias is an array of zeros where nothing was moved into an
        empty slot.
    """
    op, stored = edit.node.op, weight.dtype
    new_bias = bias
    for number, taken in enumerate(edit.absorbs, start=1):
        if not isinstance(op, LinearOp):  # a normalisation layer that stays
            weight, new_bias = weight * taken.scale, (0.0 if new_bias is None else new_bias) * taken.scale + taken.shift
            continue
        if taken.side == "padded":
            weight = absorb_padded(op, weight, taken.scale, taken.shift)
            continue
        absorb = absorb_output if taken.side == "output" else absorb_input
        dtype = stored if number == len(edit.absorbs) else WIDE
        weight, new_bias = absorb(op, weight, new_bias, taken.scale, taken.shift, dtype)
    if new_bias is None:
        assert isinstance(op, LinearOp)
        new_bias = np.zeros(op.layout.channels(weight.shape)[1])
    return weight, new_bias


def check_range(layer: str, array: Array, largest: float) -> None:
    """Refuse values that are not finite or would overflow.

    Raises:
        OverflowInFoldError: naming the layer.
    """
    peak = float(
        np.maximum(np.max(array, initial=0.0), -np.min(array, initial=0.0))
    )  # without an array of absolute values
    if not peak <= largest:
        reach = f"reach {peak:.3g}, beyond" if math.isfinite(peak) else "go beyond"
        raise OverflowInFoldError(
            f"{layer}: its new parameters {reach} the largest value {largest:.3g} of their dtype (BN115)",
            layer=layer,
            hint="leave out the layer that it would take in (--skip), or work in float32 and convert to half precision afterwards",
        )
