"""Mean and variance that can be gathered in pieces: count, mean and sum of squared deviations, merged exactly.

Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 37(3), 1983.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of `count` values per channel.

    ``m2 = sum((x - mean)**2)``, so the variance is ``m2 / count`` and, being a sum of squares, never negative.

    Args:
        count: number of values that each channel has seen; 0 for none.
        mean: float64, any shape, usually (C,).
        m2: float64, shape of `mean`.
    """

    count: int
    mean: Vector
    m2: Vector

    @staticmethod
    def of(x: NDArray[Any], axis: int = 1) -> Moments:
        """Moments of an array along every axis but `axis`, in two passes: ``mean = sum(x)/n``, ``m2 = sum((x-mean)**2)``.

        Args:
            x: at least one-dimensional; any real dtype (half precision too), computed in float64.
            axis: the channel axis; the result has shape ``(x.shape[axis],)``.
        """
        channels = np.moveaxis(np.asarray(x), axis, 0).astype(np.float64).reshape(x.shape[axis], -1)
        count = channels.shape[1]
        mean = channels.sum(axis=1) / max(count, 1)
        channels -= mean[:, None]
        return Moments(count, mean, np.square(channels).sum(axis=1))

    def merge(self, other: Moments, *, between: bool = True) -> Moments:
        """Moments of both sets of values together (Chan et al. 1983, eq. 2.1).

        ``n = na + nb``, ``d = mean_b - mean_a``, ``mean = mean_a + d*nb/n``, ``m2 = m2_a + m2_b + d**2*na*nb/n``

        Args:
            other: of the same shape.
            between: False leaves out the last term, the spread of the means: the variance is then the average
                variance *within* the groups, as instance normalisation defines it.
        """
        count = self.count + other.count
        share = other.count / max(count, 1)
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2
        if between:
            m2 = m2 + delta * delta * (self.count * share)
        return Moments(count, self.mean + delta * share, m2)

    def variance(self, *, unbiased: bool = False) -> Vector:
        """Variance per channel: ``m2 / count``, or ``m2 / (count - 1)`` where `unbiased`.

        Raises:
            ValueError: there are too few values (none, or one for the unbiased estimate).
        """
        degrees = self.count - unbiased
        if degrees < 1:
            raise ValueError(f"a variance of {self.count} values{' without bias' if unbiased else ''} is not defined")
        return self.m2 / degrees

    def statistics(self) -> tuple[Vector, Vector]:
        """Mean and population variance."""
        return self.mean, self.variance()
