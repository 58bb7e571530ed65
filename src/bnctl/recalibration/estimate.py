"""Running statistics from what a site saw: pooled, mixed with the old ones, or averaged as training does it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from bnctl.numerics.moments import Moments
from bnctl.recalibration.method import broken_before

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bnctl.recalibration.seen import Seen

    Vector = NDArray[np.float64]
    Statistics = tuple[Vector, Vector]
    """Mean and variance, float64 (C,)."""


def with_prior(
    source: Statistics, target: Moments, samples: int, prior: float, *, name: str = "the layer"
) -> Statistics:
    """Old statistics as if they were `prior` more samples (Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
    adaptation", eq. 2 and 3).

    With ``w = prior / (prior + samples)``, s for source and t for target: ``mean = w mean_s + (1 - w) mean_t`` and
    ``var = w var_s + (1 - w) var_t + w (1 - w) (mean_s - mean_t)**2``. The last term, the spread between the domains, makes it the variance of the mixture.

    Args:
        source: the old statistics.
        target: what the site saw.
        samples: how many samples of the data that is.
        prior: weight of the source in samples; 0: target alone.
        name: of the layer, for errors.

    Raises:
        ModelError: the old statistics are none that could be mixed in.
    """
    variance = target.variance()
    if prior == 0:
        return target.mean, variance
    mean, var = source
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
        raise broken_before(name)
    weight = prior / (prior + samples)
    delta = mean - target.mean
    return weight * mean + (1 - weight) * target.mean, weight * var + (1 - weight) * (variance + weight * delta * delta)


PROBE = 32
"""One batch of so many shows what new statistics produce, where a method does not see it anyway."""

CERTAIN = 4.0
"""A difference of so many standard errors is none of chance, in any of some thousand channels."""


def produced(gathered: Seen, probed: Seen | None, measured: Seen | None) -> Statistics | None:
    """What new statistics produce over all data at least, from what they do to some batches.

    With g for what was gathered of all batches while the statistics were taken, p for the same of some batches, and m for these under the new statistics:
    ``mean = mean_g + d`` and ``var = var_g * r``, with ``d = mean_m - mean_p`` and ``r = var_m / var_p``, as far as they are beyond chance: which batches were
    chosen moves d and r by the standard errors of mean_m and var_m, and :data:`CERTAIN` times these are taken off. (Batches that are each normalised by
    themselves have lost what sets them apart: the chance that is in m is not in p.) Where the batches are all there are, nothing is taken off.

    Args:
        gathered: g.
        probed: p; None, or without a value, where the site saw none of these batches.
        measured: m.

    Returns:
        Mean and variance; None where the site saw none of these batches.
    """
    mean, var = gathered.values.statistics()
    if probed is None or measured is None or not (probed.values.count and measured.values.count):
        return None
    (mean_p, var_p), (mean_m, var_m) = probed.values.statistics(), measured.values.statistics()
    left_out = 1 - measured.samples.count / gathered.samples.count
    shift, growth = mean_m - mean_p, np.divide(var_m, var_p, out=np.ones_like(var), where=var_p > 0) - 1
    if left_out > 0:
        certain = CERTAIN * math.sqrt(left_out)
        shift = _beyond(shift, certain * measured.standard_error() * np.sqrt(var_m))
        growth = _beyond(growth, certain * measured.standard_error_of_variance())
    return mean + shift, var * (1 + growth)


def _beyond(difference: Vector, chance: Vector) -> Vector:
    return np.sign(difference) * np.maximum(np.abs(difference) - chance, 0.0)


def moving_average(
    before: Statistics, calls: Iterable[Moments], momentum: float | None, calls_before: int = 0
) -> Statistics:
    """Statistics as training would leave them after these calls (``torch.nn.BatchNorm2d``).

    Per call ``mean = (1 - a) mean + a mean_b`` and ``var = (1 - a) var + a m2_b / (n_b - 1)``: training stores the variance without bias. `a` is
    `momentum`, and without one ``1 / (number of calls so far)``.

    Args:
        before: the old statistics.
        calls: of the layer, in order; those with fewer than two values per channel have no such variance and are refused by training.
        momentum: torch's, the weight of the new; None for the plain average over all calls.
        calls_before: how many there were (``num_batches_tracked``).

    Raises:
        ValueError: a call has one value per channel.
    """
    mean, var = before
    for number, seen in enumerate(calls, start=calls_before + 1):
        a = 1 / number if momentum is None else momentum
        mean, var = (1 - a) * mean + a * seen.mean, (1 - a) * var + a * seen.variance(unbiased=True)
    return mean, var
