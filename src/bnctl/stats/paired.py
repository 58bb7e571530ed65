"""Two classifiers on the same samples: the difference of their accuracies, with its interval.

Each sample falls in one of four cells; only the discordant ones carry information on the difference::

                      candidate right   candidate wrong
    baseline right          both             lost
    baseline wrong         gained           neither            difference = (gained - lost) / n

The interval is Tango's score interval: all differences d that the score test does not reject (Tango, "Equivalence
test and confidence interval for the difference in proportions for the paired-sample design", Statistics in Medicine
17, 1998). Its variance is estimated under d, not at the observed value, so that it does not collapse when no sample
disagrees: with ``lost = gained = 0`` it is ``± z² / (n + z²)``, where Wald's interval and every bootstrap give
[0, 0], a proof out of nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two accuracies on the same samples, as fractions (0.01 is one percentage point).

    Attributes:
        difference: candidate minus baseline.
        low: lower end of the interval.
        high: upper end of the interval.
        samples: n.
        lost: samples that only the baseline gets right.
        gained: samples that only the candidate gets right.
        p_value: exact McNemar test of no difference, two-sided.
    """

    difference: float
    low: float
    high: float
    samples: int
    lost: int
    gained: int
    p_value: float


def paired_difference(lost: int, gained: int, samples: int, confidence: float = CONFIDENCE) -> PairedDifference:
    """Difference of two paired proportions with Tango's score interval and McNemar's exact p-value.

    Args:
        lost: samples that only the baseline gets right.
        gained: samples that only the candidate gets right.
        samples: all samples, the concordant ones included.
        confidence: of the two-sided interval.

    Raises:
        ValueError: no samples, negative counts, or more discordant samples than samples.
    """
    if lost < 0 or gained < 0 or samples < max(1, lost + gained):
        raise ValueError(f"impossible counts: {lost} lost and {gained} gained of {samples} samples")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    estimate = (gained - lost) / samples
    low = _score_limit(gained, lost, samples, z, -1.0)
    high = _score_limit(gained, lost, samples, z, 1.0)
    return PairedDifference(estimate, low, high, samples, lost, gained, mcnemar_exact(lost, gained))


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: ``min(1, 2 P[Binomial(lost + gained, 1/2) <= min(lost, gained)])``.

    1 when no sample is discordant. Source: McNemar, Psychometrika 12, 1947; conditional on the discordant pairs.
    """
    from scipy.stats import binom

    return min(1.0, 2 * float(binom.cdf(min(lost, gained), lost + gained, 0.5)))


def _score_limit(gained: int, lost: int, n: int, z: float, end: float) -> float:
    """The end of the set of all d with ``(gained - lost - n d)² <= z² n (2 q(d) + d (1 - d))`` on the side of ``end``
    (±1).

    ``q(d)`` is the maximum likelihood estimate of the probability of *lost* when the difference is d. The left side
    outgrows the right one away from the estimate, so bisection between the estimate (inside) and ±1 (outside) finds
    the end.
    """

    def rejected(d: float) -> bool:
        linear = -gained - lost + (2 * n - gained + lost) * d
        q = (math.sqrt(max(linear * linear + 8 * n * lost * d * (1 - d), 0.0)) - linear) / (4 * n)
        return (gained - lost - n * d) ** 2 > z * z * n * (2 * q + d * (1 - d))

    inside, outside = (gained - lost) / n, end
    while True:
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            return outside
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
