"""What a site saw: the moments of all values, and how far the samples differ among each other.

Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 37(3), 1983.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnctl.numerics.moments import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Seen:
    """What came to a site in one call, or in many.

    Args:
        values: moments of all values of a channel, over samples and positions.
        samples: moments of the samples' means: one value per sample, channel and call.
        spread: moments of the samples' mean squared distances from the mean of their call.
    """

    values: Moments
    samples: Moments
    spread: Moments

    @staticmethod
    def of_groups(means: Vector, squares: Vector, positions: int, *, between: bool = True) -> list[Seen]:
        """What each of K calls sees, from each channel of each sample: a group of P values.

        With ``mean_n = sum(x)/P`` and ``m2_n = sum((x - mean_n)**2)`` over each, all groups are merged at once:
        ``mean = sum(mean_n)/N`` and ``m2 = sum(m2_n) + P*sum((mean_n - mean)**2)``. Nothing cancels.

        Args:
            means: ``mean_n``, float64 (K, N, C), N > 0.
            squares: ``m2_n``, the same.
            positions: P.
            between: False leaves out the last term of m2, as instance normalisation does.

        Returns:
            Of each call, moments of shape (C,), NaN or infinite where a value is.
        """
        samples = means.shape[1]
        with np.errstate(invalid="ignore", over="ignore"):  # the caller looks at the result
            mean, apart = _moments(means)
            between_samples = apart.sum(axis=1)
            m2, spread = squares.sum(axis=1), squares / positions
            if between:
                m2 += positions * between_samples
                spread += apart
            mean_spread, apart = _moments(spread)
            parts = zip(mean, m2, between_samples, mean_spread, apart.sum(axis=1), strict=True)
        return [
            Seen(Moments(samples * positions, a, b), Moments(samples, a, c), Moments(samples, d, e))
            for a, b, c, d, e in parts
        ]

    @staticmethod
    def nothing(channels: int) -> Seen:
        """What an empty call sees."""
        none = Moments(0, np.zeros(channels), np.zeros(channels))
        return Seen(none, none, none)

    def merge(self, other: Seen, *, between: bool = True) -> Seen:
        """Both together; for `between` see :meth:`Moments.merge`."""
        return Seen(
            self.values.merge(other.values, between=between),
            self.samples.merge(other.samples),
            self.spread.merge(other.spread),
        )

    def standard_error(self) -> Vector:
        """Standard error of each channel's mean, in standard deviations of the channel, (C,).

        ``sqrt(s2 / N) / sqrt(var)``, with ``s2 = sum((m_i - m)**2) / (N - 1)`` over the means ``m_i`` of the N samples. Positions of one sample are
        not independent, samples are taken to be: so between ``1/sqrt(N)``, where a sample is constant, and ``1/sqrt(N * positions)``. 0 for a
        channel that does not vary; infinite with one sample.
        """
        variance = self.values.variance()
        if self.samples.count < 2:
            return np.where(variance > 0, np.inf, 0.0)
        spread = self.samples.variance(unbiased=True) / self.samples.count
        return np.sqrt(np.divide(spread, variance, out=np.zeros_like(spread), where=variance > 0))

    def standard_error_of_variance(self) -> Vector:
        """Standard error of each channel's variance, as a share of it, (C,).

        ``sqrt(s2 / N) / var``, with s2 the variance over samples of their mean squared distances; and no less than ``sqrt(2) e``, where e is the mean's: so
        far Gaussian values go.
        """
        least = math.sqrt(2) * self.standard_error()
        variance = self.values.variance()
        if self.samples.count < 2:
            return least
        spread = np.sqrt(self.spread.variance(unbiased=True) / self.spread.count)
        return np.maximum(least, np.divide(spread, variance, out=np.zeros_like(spread), where=variance > 0))


def largest_error(all_seen: Iterable[Seen]) -> float:
    """The largest standard error of a mean, in standard deviations, over all channels of those that saw a value; 0 for none."""
    errors = (seen.standard_error().max(initial=0.0) for seen in all_seen if seen.values.count)
    return float(max(errors, default=0.0))


def _moments(samples: Vector) -> tuple[Vector, Vector]:
    """Of (K, N, C) the means over samples, (K, C), and the squared distances from them."""
    mean = samples.sum(axis=1) / samples.shape[1]
    apart = samples - mean[:, None]
    apart *= apart
    return mean, apart
