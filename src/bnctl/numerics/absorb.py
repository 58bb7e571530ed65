"""A linear operator absorbs a channel affine: new weights for the same function.

The weights of every linear operator are brought to one canonical form ``(groups, out, in, *kernel)`` (see
:class:`bnctl.graph.ops.WeightLayout`), on which both rules are one line each:

    after the operator    y = s*(W x + b) + t      W' = s W,   b' = s b + t
    before the operator   y = W (s*x + t) + b      W' = W s,   b' = b + sum_in,kernel(W t)

The second is exact only where the operator sees no padding (or t is 0): the planner has checked that. Everything is float64; the engine casts once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bnctl.graph.ops import LinearOp

Array = NDArray[np.float64]


def absorb_output(op: LinearOp, weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """Weight and bias of ``scale * op(x) + shift``.

    Args:
        op: says how the weight is laid out, and the factors alpha and beta of a Gemm.
        weight: as stored.
        bias: as stored, of any shape that broadcasts against (out channels,); None where there is none.
        scale: (out channels,).
        shift: (out channels,).
    """
    canonical = op.layout.canonical(weight)
    groups, out = canonical.shape[:2]
    factor = scale.reshape(groups, out, *[1] * (canonical.ndim - 2))
    new_bias = shift / op.bias_factor
    return op.layout.stored(canonical * factor), new_bias if bias is None else bias * scale + new_bias


def absorb_input(op: LinearOp, weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """Weight and bias of ``op(scale * x + shift)``; scale and shift are (in channels,)."""
    canonical = op.layout.canonical(weight)
    groups, _, inner = canonical.shape[:3]
    ones = [1] * (canonical.ndim - 3)
    moved = (canonical * shift.reshape(groups, 1, inner, *ones)).sum(axis=tuple(range(2, canonical.ndim))).reshape(-1)
    new_bias = moved * op.weight_factor / op.bias_factor
    new_weight = op.layout.stored(canonical * scale.reshape(groups, 1, inner, *ones))
    return new_weight, new_bias if bias is None else bias + new_bias
