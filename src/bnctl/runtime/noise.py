"""How much a model magnifies rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.numerics.compare import compare

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.runtime.runner import Runner

NOISE_ULPS = 8
"""By how many units in the last place the inputs are shaken: rounding happens in every layer, not only at the input, and a
smaller step may not cross a single quantum of a saturated output."""


def rounding_noise(runner: Runner, batch: Batch, outputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """How far each output moves, at most, when every float input is changed by :data:`NOISE_ULPS` units in the last place.

    Two seeded draws of signs; 0 for a model whose inputs are all integers.

    Args:
        runner: the model.
        batch: its inputs.
        outputs: what it gives on them.
    """
    step = NOISE_ULPS * _UNITS.get(runner.precision, 2.0**-23)
    noise = dict.fromkeys(outputs, 0.0)
    for seed in range(2):
        signs = np.random.default_rng(seed)

        def shake(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: shake(inner) for key, inner in value.items()}
            if isinstance(value, (list, tuple)) and type(value) in {list, tuple}:
                return type(value)(shake(inner) for inner in value)
            array = np.asarray(value.detach().cpu()) if hasattr(value, "detach") else value
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
                return value
            return (array * (1 + step * signs.choice([-1.0, 1.0], array.shape))).astype(array.dtype)  # noqa: B023

        shaken = replace(
            batch, args=tuple(map(shake, batch.args)), kwargs={k: shake(v) for k, v in batch.kwargs.items()}
        )
        for name, value in runner.run(shaken).items():
            error = compare(outputs[name], value).max_abs if name in noise else 0.0
            noise[name] = max(noise.get(name, 0.0), error if math.isfinite(error) else 0.0)
    return noise


_UNITS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
