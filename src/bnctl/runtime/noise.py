"""How much a model magnifies rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.data.resize import rebuilt
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


@dataclass(frozen=True)
class Noise:
    """How far rounding moves a value.

    Attributes:
        moved: the largest change of an element; of whole numbers, the share of elements that change.
        reshaped: rounding decides on the shape: how many boxes a detector finds.
        compared: whether there was a run that gave the same shape.
    """

    moved: float = 0.0
    reshaped: bool = False
    compared: bool = False

    def joined(self, other: Noise) -> Noise:
        """The larger of both."""
        return Noise(max(self.moved, other.moved), self.reshaped or other.reshaped, self.compared or other.compared)


def difference(value: NDArray[Any], other: NDArray[Any]) -> float:
    """By how much two arrays of one shape differ, in the measure of :attr:`Noise.moved`."""
    if value.dtype.kind in "iub":
        return float(np.mean(value != other)) if value.size else 0.0
    if value.dtype.kind not in "fc":
        return 0.0
    error = compare(value.astype(other.dtype), other).max_abs
    return error if math.isfinite(error) else 0.0


def rounding_noise(
    runner: Runner,
    batch: Batch,
    values: Mapping[str, NDArray[Any]],
    *,
    layers: bool = False,
    restore: Callable[[], None] = lambda: None,
) -> dict[str, Noise]:
    """How far rounding alone moves each value of a model, at most: the larger of two measurements.

    One shakes every float input by :data:`NOISE_ULPS` units in the last place (two seeded draws of signs; nothing for integers). The other runs the model in
    float64, where the runtime can and where that is still the same function: an error that a candidate shares with the model itself is none of surgery. It
    is not, where a mere copy gives something else already, or beyond :data:`DISPROPORTION`.

    Args:
        runner: the model.
        batch: its inputs.
        values: what it gives on them: its outputs, or the outputs of inner layers.
        layers: the values are those of inner layers.
        restore: puts the model into the state in which it gave them. It is left as it is now.
    """
    now = runner.snapshot()
    try:
        return _rounding_noise(runner, batch, values, layers, restore)
    finally:
        now()


def _rounding_noise(
    runner: Runner, batch: Batch, values: Mapping[str, NDArray[Any]], layers: bool, restore: Callable[[], None]
) -> dict[str, Noise]:
    def measured(model: Runner | None, given: Batch) -> dict[str, Noise]:
        restore()
        try:
            others = {} if model is None else model.observe(given, list(values))[1] if layers else model.run(given)
        except ModelError:  # its code asks for a float type by name, or for inputs within bounds
            others = {}
        return {name: _moved(value, others[name]) if name in others else Noise() for name, value in values.items()}

    first, second = (measured(runner, _shaken(runner, batch, seed)) for seed in range(2))
    noise = {name: first[name].joined(second[name]) for name in values}
    restore()  # copies begin where it began
    wide = measured(runner.in_float64(), batch)
    if any(wide[name].joined(noise[name]) != noise[name] for name in values):
        restore()
        same = measured(runner.perturbed(0.0), batch)
        wide = {
            n: w for n, w in wide.items() if same[n].moved <= noise[n].moved and same[n].reshaped <= noise[n].reshaped
        }
    if any(_is_large(values[name], found.moved) for name, found in wide.items()):
        restore()
        bound = measured(runner.perturbed(_step(runner)), batch)
        limit = {name: DISPROPORTION * noise[name].joined(bound[name]).moved for name in values}
        wide = {n: w for n, w in wide.items() if not _is_large(values[n], w.moved) or w.moved <= limit[n]}
    return {name: found.joined(wide.get(name, Noise())) for name, found in noise.items()}


def _moved(value: NDArray[Any], other: NDArray[Any]) -> Noise:
    if value.shape != other.shape:
        return Noise(reshaped=True)
    return Noise(difference(value, other), compared=True)


def _is_large(value: NDArray[Any], moved: float) -> bool:
    """Whether a value moves by more than :data:`DROWNED` of its scale."""
    scale = float(np.max(np.abs(value), initial=0.0)) if value.dtype.kind in "fc" else 1.0
    return moved > DROWNED * scale


def _step(runner: Runner) -> float:
    return NOISE_ULPS * _UNITS.get(runner.precision, 2.0**-23)


def _shaken(runner: Runner, batch: Batch, seed: int) -> Batch:
    step = _step(runner)
    signs = np.random.default_rng(seed)

    def shake(value: Any) -> Any:
        if isinstance(value, Mapping):
            return rebuilt(value, {key: shake(inner) for key, inner in value.items()})
        if isinstance(value, (list, tuple)) and type(value) in {list, tuple}:
            return type(value)(shake(inner) for inner in value)
        array = as_array(value) if hasattr(value, "detach") else value
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fc":
            return value
        return (array * (1 + step * signs.choice([-1.0, 1.0], array.shape))).astype(array.dtype)

    kwargs = {key: shake(value) for key, value in batch.kwargs.items()}
    return replace(batch, args=tuple(map(shake, batch.args)), kwargs=kwargs)


_UNITS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
