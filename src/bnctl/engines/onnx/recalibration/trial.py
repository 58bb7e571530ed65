"""Arithmetic with constants, run with random numbers in their place, to find out which of them are statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.data.batches import Batch
from bnctl.engines.onnx.recalibration.extract import extracted

_ROUNDINGS = 64
"""Relative differences up to so many units of rounding are none."""

Given = Mapping[ir.Value, NDArray[Any]]
"""Constants and their values."""


class Trial:
    """A chain with y = scale * x + shift, run on x = 0 and x = 1.

    Args:
        model: not changed.
        x: what comes into the chain.
        points: 0 and 1 along the first axis, as many axes as x has, and its type.
        constants: those that are tried, with arrays of their shapes and types; each varies along one axis.
        y: what comes out.
        roots: what square roots are taken of.

    Raises:
        ModelError: the runtime does not know an operator for these types.
    """

    def __init__(
        self,
        model: ir.Model,
        x: ir.Value,
        points: NDArray[Any],
        constants: Given,
        y: ir.Value,
        roots: Sequence[ir.Value],
    ) -> None:
        from bnctl.runtime.ort import OrtRunner

        types = {v: ir.TensorType(ir.DataType.from_numpy(a.dtype)) for v, a in {x: points, **constants}.items()}
        part = extracted(model, types, [v for v in (y, *roots) if v not in constants])
        self._inputs = {str(value.name) for value in part.graph.inputs}
        self._run = OrtRunner(part).run
        self._x, self._points, self._y = x, points, y
        self._roundings = _ROUNDINGS * float(ml_dtypes.finfo(points.dtype).eps)  # type: ignore[no-untyped-call]
        generator = np.random.default_rng(0)
        self._one, self._two = (
            {v: generator.uniform(0.5, 2.0, a.shape).astype(a.dtype) for v, a in constants.items()} for _ in range(2)
        )

    def eps(self, root: ir.Value, var: ir.Value) -> float | None:
        """What is added to a constant before the root is taken, if ``root = var + eps``."""
        at_zero, at_one = (
            self._value(root, self._one | {var: value}).reshape(-1)
            for value in (np.zeros_like(self._one[var]), self._one[var])
        )
        eps = float(at_zero[0]) if at_zero.size else -1.0
        expected = self._one[var].reshape(-1) + eps
        constant = eps >= 0 and np.all(at_zero == at_zero[0])
        return eps if constant and at_one.shape == expected.shape and self._agree(at_one, expected) else None

    def mean(self, var: ir.Value, eps: float) -> tuple[ir.Value, int] | None:
        """The constant that is the mean, if this one is the variance, and the axis of x along which both are; None where there is none.

        With the mean and the variance changed, ``gamma = scale * sqrt(var + eps)`` and ``beta = shift + scale * mean`` are what they were.
        """
        for mean in self._one:
            if mean is not var and self._one[mean].size == self._one[var].size:
                changed = self._one | {mean: self._two[mean], var: self._two[var]}
                before, after = (self._gamma_beta(constants, mean, var, eps) for constants in (self._one, changed))
                if before is not None and after is not None and self._agree(before[0], after[0]):
                    return mean, before[1]
        return None

    def _gamma_beta(
        self, constants: Given, mean: ir.Value, var: ir.Value, eps: float
    ) -> tuple[NDArray[np.float64], int] | None:
        """Both, (2, C), and their axis; None where y varies along another axis than one."""
        y = self._value(self._y, constants)
        axes = [axis for axis, size in enumerate(y.shape) if axis and size > 1]
        if len(y) != len(self._points) or len(axes) != 1 or y.shape[axes[0]] != constants[var].size:
            return None
        shift, at_one = y.reshape(2, -1)
        scale = at_one - shift
        m, v = (np.asarray(constants[c], np.float64).reshape(-1) for c in (mean, var))
        return np.stack([scale * np.sqrt(v + eps), shift + scale * m]), axes[0]

    def _agree(self, one: NDArray[np.float64], two: NDArray[np.float64]) -> bool:
        return bool(np.allclose(one, two, rtol=self._roundings, atol=self._roundings))

    def _value(self, value: ir.Value, constants: Given) -> NDArray[np.float64]:
        given = {str(v.name): a for v, a in {self._x: self._points, **constants}.items()}
        known = given | self._run(Batch(kwargs={name: a for name, a in given.items() if name in self._inputs}))
        return np.asarray(known[str(value.name)], np.float64)
