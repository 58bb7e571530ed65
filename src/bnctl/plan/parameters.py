"""New parameters for an edit, in float64, and the one cast to the layer's dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import OverflowInFoldError
from bnctl.graph.affine import Array
from bnctl.graph.ops import LinearOp
from bnctl.numerics.absorb import absorb_input, absorb_output, absorb_padded
from bnctl.plan.draft import Edit


def new_parameters(edit: Edit, weight: NDArray[Any], bias: Array | None) -> tuple[NDArray[Any], Array]:
    """Weight and bias after the edit.

    Args:
        edit: what is absorbed, in order.
        weight: the stored weight (or gamma of a normalisation layer), in its own type: what is multiplied by float64 is float64.
        bias: the stored bias (or beta), as float64; None where the slot is empty.

    Returns:
        Both as float64; the weight as it was, where nothing changes it. The bias is an array of zeros where nothing was moved into an empty slot.
    """
    op = edit.node.op
    new_bias = bias
    for taken in edit.absorbs:
        if not isinstance(op, LinearOp):  # a normalisation layer that stays
            weight, new_bias = weight * taken.scale, (0.0 if new_bias is None else new_bias) * taken.scale + taken.shift
            continue
        if taken.side == "padded":
            weight = absorb_padded(op, weight, taken.scale, taken.shift)
            continue
        absorb = absorb_output if taken.side == "output" else absorb_input
        weight, new_bias = absorb(op, weight, new_bias, taken.scale, taken.shift)
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
        raise OverflowInFoldError(
            f"{layer}: its new parameters reach {peak:.3g}, beyond the largest value {largest:.3g} of their dtype (BN115)",
            hint="leave out the layer that it would take in (--skip), or work in float32 and convert to half precision afterwards",
        )
