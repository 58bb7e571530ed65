"""How much a model magnifies rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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


def rounding_noise(
    runner: Runner, batch: Batch, values: Mapping[str, NDArray[Any]], *, layers: bool = False
) -> dict[str, float]:
    """How far rounding alone moves each value of a model, at most: the larger of two measurements.

    One shakes every float input by :data:`NOISE_ULPS` units in the last place (two seeded draws of signs; nothing for integers). The other runs the model in
    float64, where the runtime can: an error that a candidate shares with the model itself is none of surgery.

    Args:
        runner: the model.
        batch: its inputs.
        values: what it gives on them: its outputs, or the outputs of inner layers.
        layers: the values are those of inner layers.
    """

    def run(model: Runner, given: Batch) -> Mapping[str, NDArray[Any]]:
        return model.observe(given, list(values))[1] if layers else model.run(given)

    noise = dict.fromkeys(values, 0.0)
    for other in _others(runner, batch, run):
        for name, value in other.items():
            if name in noise:
                noise[name] = max(noise[name], _moved(values[name], value))
    return noise


def _moved(value: NDArray[Any], other: NDArray[Any]) -> float:
    """By how much; infinitely, where rounding decides on a shape or a whole number: how many boxes a detector finds, and in which order."""
    if value.shape != other.shape or (value.dtype.kind in "iub" and not np.array_equal(value, other)):
        return math.inf
    error = compare(value.astype(other.dtype), other).max_abs
    return error if math.isfinite(error) else 0.0


def _others(
    runner: Runner, batch: Batch, run: Callable[[Runner, Batch], Mapping[str, NDArray[Any]]]
) -> Iterator[Mapping[str, NDArray[Any]]]:
    """What rounding could have made of the values."""
    for seed in range(2):
        yield run(runner, _shaken(runner, batch, seed))
    reference = runner.in_float64()
    if reference is not None:
        try:
            yield run(reference, batch)
        except ModelError:  # its code asks for a float type by name
            return


def _shaken(runner: Runner, batch: Batch, seed: int) -> Batch:
    step = NOISE_ULPS * _UNITS.get(runner.precision, 2.0**-23)
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
