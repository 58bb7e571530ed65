"""How much a model magnifies rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import ModelError
from bnctl.numerics.compare import compare
from bnctl.runtime.feeds import as_array

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.runtime.runner import Runner

NOISE_ULPS = 8
"""By how many units in the last place the inputs are shaken: rounding happens in every layer, not only at the input, and a
smaller step may not cross a single quantum of a saturated output."""


DROWNED = 1e-2
"""Relative error from which on agreement by the allowance for rounding is no evidence."""

DISPROPORTION = 1e3
"""A model moves by this many times as much, at most, when it is computed in float64, as when its inputs and parameters are changed by :data:`NOISE_ULPS`,
as far as it moves by more than :data:`DROWNED` at all. What moves further is another function: code that asks for the type, or a copy that lost something."""


def rounding_noise(
    runner: Runner, batch: Batch, values: Mapping[str, NDArray[Any]], *, layers: bool = False
) -> dict[str, float]:
    """How far rounding alone moves each value of a model, at most: the larger of two measurements.

    One shakes every float input by :data:`NOISE_ULPS` units in the last place (two seeded draws of signs; nothing for integers). The other runs the model in
    float64, where the runtime can and where that is still the same function (:data:`DISPROPORTION`): an error that a candidate shares with the model itself
    is none of surgery.

    Args:
        runner: the model.
        batch: its inputs.
        values: what it gives on them: its outputs, or the outputs of inner layers.
        layers: the values are those of inner layers.
    """

    def run(model: Runner, given: Batch) -> Mapping[str, NDArray[Any]]:
        return model.observe(given, list(values))[1] if layers else model.run(given)

    noise = dict.fromkeys(values, 0.0)
    for seed in range(2):
        _raise(noise, values, run(runner, _shaken(runner, batch, seed)))
    wide = _run(runner.in_float64(), batch, run)
    moved = _raise(dict.fromkeys(values, 0.0), values, wide)
    if any(
        moved[name] > noise[name] for name in values
    ):  # copies may have lost something, and would be another function
        same = _raise(dict.fromkeys(values, 0.0), values, _run(runner.perturbed(0.0), batch, run))
        moved = {name: error if same[name] <= noise[name] else 0.0 for name, error in moved.items()}
    if any(DROWNED * float(np.max(np.abs(values[n]), initial=0.0)) < moved[n] < math.inf for n in values):
        bound = _raise(dict(noise), values, _run(runner.perturbed(_step(runner)), batch, run))
        moved = {name: error for name, error in moved.items() if error <= DISPROPORTION * bound[name]}
    return {name: max(least, moved.get(name, 0.0)) for name, least in noise.items()}


def _raise(
    noise: dict[str, float], values: Mapping[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Let the noise of each value be at least what it differs by from another one."""
    for name in noise.keys() & others.keys():
        noise[name] = max(noise[name], _moved(values[name], others[name]))
    return noise


def _moved(value: NDArray[Any], other: NDArray[Any]) -> float:
    """By how much; infinitely, where rounding decides on a shape or a whole number: how many boxes a detector finds, and in which order."""
    if value.shape != other.shape or (value.dtype.kind in "iub" and not np.array_equal(value, other)):
        return math.inf
    error = compare(value.astype(other.dtype), other).max_abs
    return error if math.isfinite(error) else 0.0


def _run(
    runner: Runner | None, batch: Batch, run: Callable[[Runner, Batch], Mapping[str, NDArray[Any]]]
) -> Mapping[str, NDArray[Any]]:
    """What another runner gives; nothing where there is none, or it fails."""
    if runner is None:
        return {}
    try:
        return run(runner, batch)
    except ModelError:  # its code asks for a float type by name
        return {}


def _step(runner: Runner) -> float:
    return NOISE_ULPS * _UNITS.get(runner.precision, 2.0**-23)


def _shaken(runner: Runner, batch: Batch, seed: int) -> Batch:
    step = _step(runner)
    signs = np.random.default_rng(seed)

    def shake(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shake(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)) and type(value) in {list, tuple}:
            return type(value)(shake(inner) for inner in value)
        array = as_array(value) if hasattr(value, "detach") else value
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            return value
        return (array * (1 + step * signs.choice([-1.0, 1.0], array.shape))).astype(array.dtype)

    kwargs = {key: shake(value) for key, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(shake, batch.args)), kwargs=kwargs)


_UNITS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
