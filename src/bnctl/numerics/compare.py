"""How far two arrays are apart, in float64, and how far rounding alone may put them.

The relative error here is normwise, not elementwise::

    rel(a, b) = max|a - b| / rms(a)

An elementwise ``|a - b| / |a|`` is the wrong measure for what a network computes: each output is a sum of many terms,
its rounding error is proportional to the size of those *terms*, and where they cancel the quotient is unbounded
although nothing is wrong (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1 and 6.2). A
tolerance wide enough for those elements would let real faults through. The scale is the root mean square rather than
the maximum, because one outlier must not hide an error in all the other elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DEFAULT_DEPTH = 100
_NUMBERS = "fciub"  # numpy's letters for float, complex, signed, unsigned, boolean
_TINY = float(np.finfo(np.float64).tiny)
_PIECE = 8192
# Unit roundoff u = 2^-p, with p the bits of the significand.
_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def tolerance(dtype: str, depth: int = DEFAULT_DEPTH) -> float:
    """The relative error that rounding alone may cause between two evaluations of one function.

    ::

        tol = (4 u_store + 128 u_sum) * sqrt(depth)

    Each layer rounds its weights and its result once to the storage type, with unit roundoff ``u_store``, and sums
    about a thousand products in the accumulator's type (float32 for the half types, else the type itself), with unit
    roundoff ``u_sum``. Rounding errors of many terms and layers add up as a random walk, hence the roots (Higham,
    section 2.8): ``128 = 4 sqrt(1024)``, where the 4 leaves room for the largest among many elements. At the default
    depth::

        float64 1.5e-13    float32 7.9e-5    float16 2.0e-2    bfloat16 1.6e-1

    Integers and booleans carry no rounding: 0.

    Args:
        dtype: name of the coarsest type that takes part in the computation, as numpy, ml_dtypes or torch spell it.
        depth: layers between input and output.
    """
    u_store = _UNIT_ROUNDOFF.get(str(dtype).removeprefix("torch."), 0.0)
    u_sum = min(u_store, _UNIT_ROUNDOFF["float32"])
    return (4 * u_store + 128 * u_sum) * math.sqrt(depth)


@dataclass(frozen=True)
class ArrayError:
    """How far a candidate array is from its baseline.

    Attributes:
        max_abs: ``max|a - b|`` over the elements that are finite in both; inf where the arrays cannot be compared.
        max_rel: ``max_abs / rms(a)``; inf where they cannot be compared.
        mismatch: why they cannot be compared (shape, type, NaN or infinity on one side), or None.
        informative: whether the baseline holds a finite element other than zero: with none, agreement proves nothing.
    """

    max_abs: float
    max_rel: float
    mismatch: str | None = None
    informative: bool = True

    def within(self, limit: float) -> bool:
        """Whether the arrays are comparable and at most ``limit`` apart, relative to the baseline's scale."""
        return self.mismatch is None and self.max_rel <= limit


def compare(baseline: Array, candidate: Array) -> ArrayError:
    """The distance between two arrays; where shape, type, NaNs or infinities differ, it is infinite.

    Computed in float64 (complex128 for complex values). NaNs must sit in the same places, and infinities be equal.
    Integers beyond 2^53 are compared after rounding to float64.

    Args:
        baseline: array of any shape and type.
        candidate: the array to judge.
    """
    mismatch = _layout_mismatch(baseline, candidate)
    if mismatch is not None:
        return ArrayError(math.inf, math.inf, mismatch, _is_informative(baseline))
    if baseline.dtype.kind not in _NUMBERS:  # equal, or the layout would not fit
        return ArrayError(0.0, 0.0, None, bool(baseline.size))
    max_abs, scale = _distance(baseline, candidate)
    if math.isfinite(max_abs):  # so all values are
        return ArrayError(max_abs, max_abs / max(scale, _TINY) if max_abs else 0.0, None, scale > 0)
    a, b, informative = _widen(baseline), _widen(candidate), _is_informative(baseline)
    finite = np.isfinite(a) & np.isfinite(b)
    mismatch = _special_mismatch(a[~finite], b[~finite])
    if mismatch is not None:
        return ArrayError(math.inf, math.inf, mismatch, informative)
    max_abs, scale = _distance(a[finite], b[finite])
    return ArrayError(max_abs, max_abs / max(scale, _TINY), None, informative)


def _distance(baseline: Array, candidate: Array) -> tuple[float, float]:
    """``max|a - b|`` and ``rms(a)``; both 0 for no values, and the second 0 where the first is not finite.

    In pieces that stay in the processor's cache: wide copies of whole arrays took seven times as long. Two finite values may be further apart than float64
    reaches: that is infinite, not a warning.
    """
    a, b = baseline.reshape(-1), candidate.reshape(-1)
    largest, norms = 0.0, []
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, a.size, _PIECE):
            piece = _widen(a[start : start + _PIECE])
            difference = np.abs(piece - _widen(b[start : start + _PIECE])).max()
            if not difference <= largest:  # NaN is kept
                largest = float(difference)
                if not math.isfinite(largest):
                    return largest, 0.0
            norms.append(_norm(piece))
    return largest, math.hypot(*norms) / math.sqrt(max(a.size, 1))


def rms(values: Array) -> float:
    """Root mean square ``sqrt(mean(|v|^2))`` of finite values, without overflow; 0 for no values."""
    return _norm(np.ravel(values)) / math.sqrt(max(values.size, 1))


def _norm(values: Array) -> float:
    """``sqrt(sum(|v|^2))`` of a vector in float64 or complex128, scaled where a square would leave the range."""
    with np.errstate(over="ignore", under="ignore"):
        square = float(np.vdot(values, values).real)
    if _TINY < square < math.inf:
        return math.sqrt(square)
    peak = float(np.max(np.abs(values), initial=0.0))
    if not 0 < peak < math.inf:
        return peak
    scaled = values / peak
    return peak * math.sqrt(np.vdot(scaled, scaled).real)


@dataclass(frozen=True)
class Flips:
    """Rows whose largest entry moved.

    Attributes:
        rows: rows compared.
        flipped: rows in which the argmax differs.
        near_ties: those among ``flipped`` where the baseline itself held the two entries closer together than rounding
            may move them: its choice was a coin toss.
    """

    rows: int = 0
    flipped: int = 0
    near_ties: int = 0

    def __add__(self, other: Flips) -> Flips:
        return Flips(self.rows + other.rows, self.flipped + other.flipped, self.near_ties + other.near_ties)


def count_flips(baseline: Array, candidate: Array, limit: float) -> Flips | None:
    """Rows of logits whose argmax differs; None where the arrays are not logits of one shape.

    Logits are float arrays of shape (N, C) with C >= 2. A flip is a near tie when
    ``a[i, argmax a[i]] - a[i, argmax b[i]] <= 2 limit rms(a)``: both entries may have moved by ``limit rms(a)``.
    """
    if not (is_logits(baseline) and is_logits(candidate) and baseline.shape == candidate.shape):
        return None
    a, b = _widen(baseline), _widen(candidate)
    before, after = a.argmax(axis=1), b.argmax(axis=1)
    rows = np.flatnonzero(before != after)
    with np.errstate(invalid="ignore"):  # inf - inf: not a near tie
        margin = a[rows, before[rows]] - a[rows, after[rows]]
    near = margin <= 2 * limit * rms(a[np.isfinite(a)])
    return Flips(len(a), rows.size, int(np.count_nonzero(near)))


def is_logits(array: Array) -> bool:
    """Whether an array looks like class scores: floats of shape (N, C) with C >= 2."""
    return array.ndim == 2 and array.shape[1] >= 2 and array.dtype.kind == "f"


def _is_informative(array: Array) -> bool:
    if array.dtype.kind not in _NUMBERS:
        return bool(array.size)
    values = _widen(array)
    return bool(np.any(np.isfinite(values) & (values != 0)))


def _layout_mismatch(a: Array, b: Array) -> str | None:
    if a.shape != b.shape:
        return f"shape {a.shape} became {b.shape}"
    if a.dtype != b.dtype:
        return f"type {a.dtype} became {b.dtype}"
    if a.dtype.kind not in _NUMBERS and not np.array_equal(a, b):
        return f"values of type {a.dtype} differ"
    return None


def _special_mismatch(a: Array, b: Array) -> str | None:
    if np.any(np.isnan(a) != np.isnan(b)):
        return "NaN on one side only"
    both = ~np.isnan(a)
    if np.any(a[both] != b[both]):
        return "infinite on one side only"
    return None


def _widen(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
