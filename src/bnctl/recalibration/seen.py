"""What a site saw: the moments of all values, and how far the samples differ among each other."""

from __future__ import annotations

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
    """

    values: Moments
    samples: Moments

    def merge(self, other: Seen, *, between: bool = True) -> Seen:
        """Both together; for `between` see :meth:`Moments.merge`."""
        return Seen(self.values.merge(other.values, between=between), self.samples.merge(other.samples))

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
