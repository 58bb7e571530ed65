"""A site of an ONNX model: which statistics it keeps, in what form, and where it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.engines.onnx.translated import Place
from bnctl.recalibration.method import does_not_fit

if TYPE_CHECKING:
    from bnctl.recalibration.estimate import Statistics

Role = Literal["mean", "var"]

Arrays = dict[Role, NDArray[Any]]
"""The statistics of a site as its model stores them."""

Form = Literal["variance", "deviation"]
"""What is stored of the variance: itself, or ``sqrt(var + eps)``."""


@dataclass(frozen=True, eq=False)
class Operand:
    """An input of a node behind which statistics lie: themselves, or constants that are computed from them.

    Args:
        place: the input.
        leaves: the constants that are statistics, and which ones.
    """

    place: Place
    leaves: Mapping[ir.Value, Role]


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant that is a statistic."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Site:
    """One normalisation: ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` along one axis.

    Args:
        name: of the layer; no other site has it.
        x: what it normalises.
        axis: of the channels.
        eps: added to the variance.
        momentum: weight of a new batch in training, as torch has it.
        stored: the constants that hold the statistics.
        form: what is stored of the variance.
        operands: where they are read.
        before: mean and variance as they were, float64 (C,).
    """

    name: str
    x: ir.Value
    axis: int
    eps: float
    momentum: float
    stored: Mapping[Role, Stored]
    form: Form
    operands: tuple[Operand, ...]
    before: Statistics

    def encode(self, statistics: Statistics) -> Arrays:
        """Mean and variance as the model stores them, cast once.

        Raises:
            ModelError: a value does not fit the type.
        """
        mean, var = statistics
        with np.errstate(over="ignore", divide="ignore"):
            spread = var if self.form == "variance" else np.sqrt(var + self.eps)
            arrays = {"mean": self._cast("mean", mean), "var": self._cast("var", spread)}
        for array in arrays.values():
            if not np.isfinite(array.astype(np.float64)).all():
                raise does_not_fit(self.name, str(array.dtype))
        return arrays  # type: ignore[return-value]

    def decode(self, arrays: Arrays) -> Statistics:
        """Mean and variance, float64 (C,), from what is stored."""
        return decode(arrays["mean"], arrays["var"], self.form, self.eps)

    def _cast(self, role: Role, vector: NDArray[np.float64]) -> NDArray[Any]:
        kept = self.stored[role]
        return vector.reshape(kept.shape).astype(kept.dtype)


def decode(mean: NDArray[Any], spread: NDArray[Any], form: Form, eps: float) -> Statistics:
    """Mean and variance, float64 (C,), from arrays of any shape with C elements."""
    wide = np.asarray(spread, np.float64).reshape(-1)
    var = wide if form == "variance" else np.maximum(wide * wide - eps, 0.0)
    return np.asarray(mean, np.float64).reshape(-1), var
