"""A linear operator absorbs a channel affine: new weights for the same function.

The weights of every linear operator are brought to one canonical form ``(groups, out, in, *kernel)`` (see
:class:`bnctl.graph.ops.WeightLayout`), on which both rules are one line each:

    after the operator    y = s*(W x + b) + t      W' = s W,   b' = s b + t      (a table of embeddings: W' = s W + t)
    before the operator   y = W (s*x + t) + b      W' = W s,   b' = b + sum_in,kernel(W t)

The second is exact only where the operator sees no padding (or t is 0): the planner has checked that. With zeros around the input and a further channel of
ones inside them, ``W*(s*x + t) = [W s, sum_in(W t)]*[x, 1]`` is exact too. Everything is float64; the engine casts once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.graph.ops import Embedding, LinearOp

Array = NDArray[np.float64]
Stored = NDArray[Any]
"""A weight in the type in which its model stores it, or in float64."""

WIDE = np.dtype(np.float64)


def absorb_output(
    op: LinearOp, weight: Stored, bias: Array | None, scale: Array, shift: Array, dtype: np.dtype[Any] = WIDE
) -> tuple[Stored, Array]:
    """Weight and bias of ``scale * op(x) + shift``.

    Args:
        op: says how the weight is laid out, and the factors alpha and beta of a Gemm.
        weight: as stored, of any float type; it is widened where it is multiplied.
        bias: as float64, of any shape that broadcasts against (out channels,); None where there is none.
        scale: (out channels,).
        shift: (out channels,).
        dtype: of the new weight; it is computed in float64 and cast once.
    """
    if isinstance(op, Embedding):  # one row is looked up and nothing is added up, so that the shift goes into the rows
        return weight * scale + shift, np.zeros(len(shift))
    canonical = op.layout.canonical(weight)
    groups, out = canonical.shape[:2]
    factor = scale.reshape(groups, out, *[1] * (canonical.ndim - 2))
    new_bias = shift / op.bias_factor
    return op.layout.stored(_times(canonical, factor, dtype)), new_bias if bias is None else bias * scale + new_bias


def absorb_input(
    op: LinearOp, weight: Stored, bias: Array | None, scale: Array, shift: Array, dtype: np.dtype[Any] = WIDE
) -> tuple[Stored, Array]:
    """Weight and bias of ``op(scale * x + shift)``; scale and shift are (in channels,)."""
    canonical = op.layout.canonical(weight)
    groups, _, inner = canonical.shape[:3]
    ones = [1] * (canonical.ndim - 3)
    moved = (canonical * shift.reshape(groups, 1, inner, *ones)).sum(axis=tuple(range(2, canonical.ndim))).reshape(-1)
    new_bias = moved * op.weight_factor / op.bias_factor
    new_weight = op.layout.stored(_times(canonical, scale.reshape(groups, 1, inner, *ones), dtype))
    return new_weight, new_bias if bias is None else bias + new_bias


def _times(weight: Stored, factor: Array, dtype: np.dtype[Any]) -> Stored:
    """The product in float64, cast once, without an array of float64 in between: numpy widens a buffer at a time. What does not fit becomes infinite."""
    with np.errstate(over="ignore"):
        return np.multiply(weight, factor, out=np.empty(weight.shape, dtype), dtype=WIDE, casting="unsafe")


def absorb_padded(op: LinearOp, weight: Stored, scale: Array, shift: Array) -> Array:
    """Weight of ``op(scale * x + shift)`` over ``[x, 1]``, for a single group. The bias stays.

    Args:
        op: a convolution.
        weight: as stored, over x or already over ``[x, 1]``.
        scale, shift: (channels of x,).
    """
    canonical = op.layout.canonical(weight)
    over_x, over_ones = np.split(canonical, [len(scale)], axis=2)
    ones = [1] * (canonical.ndim - 3)
    border = (over_x * shift.reshape(1, 1, -1, *ones)).sum(axis=2, keepdims=True) + over_ones.sum(
        axis=2, keepdims=True, dtype=np.float64
    )
    return op.layout.stored(np.concatenate([over_x * scale.reshape(1, 1, -1, *ones), border], axis=2))
