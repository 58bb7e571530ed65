"""What recalibration reports for each site, and how far two sets of statistics are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from bnctl.numerics.moments import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

NOT_SELECTED = "BN301"
NEVER_REACHED = "BN302"
FROZEN = "BN303"
NO_STATISTICS = "BN304"
NOT_IN_STATE = "BN305"
NOT_CONVERGED = "BN306"


@dataclass(frozen=True)
class Drift:
    """How far a site's statistics moved: symmetric KL divergence per channel, in nats; mean and maximum over channels."""

    mean: float
    max: float


@dataclass(frozen=True)
class SiteStatistics:
    """What happened to one site.

    Args:
        name: path of the normalisation's running mean in the model, without ``.running_mean``.
        action: "recalibrated", or "left" as it was.
        code: of the reason why it was left; on a recalibrated site, of a remark.
        reason: the same in words.
        channels: number of channels, where known.
        count: values per channel that the statistics rest on (all calls of a pass).
        calls: how often the site was called in a pass over the data.
        dead_channels: number of channels whose values did not vary at all, to the rounding of the model's precision.
        drift: old statistics against new; None where left, or where the old ones were not finite.
        self_consistency: largest difference between the stored statistics and those that the recalibrated model produces in
            inference, in units of the layer's own scale; see :func:`discrepancy`. Where that was measured on some batches, as far as it is
            beyond chance. None where left.
        standard_error: of the mean, in standard deviations, of the channel that is known worst; see :meth:`bnctl.recalibration.seen.Seen.standard_error`.
    """

    name: str
    action: Literal["recalibrated", "left"]
    code: str | None = None
    reason: str | None = None
    channels: int | None = None
    count: int = 0
    calls: int = 0
    dead_channels: int = 0
    drift: Drift | None = None
    self_consistency: float | None = None
    standard_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON report."""
        from dataclasses import asdict

        return asdict(self)


Native = TypeVar("Native")


@dataclass(frozen=True, eq=False)
class Recalibrated(Generic[Native]):
    """What came of a recalibration.

    Attributes:
        model: the copy with new statistics.
        sites: what happened to each site.
        samples: how many the statistics rest on.
        skipped: numbers of the batches that were left out since they hold NaN or infinity.
        standard_error: the largest of all channels' means, in standard deviations.
        enough: whether that is within the tolerance; None where none was given.
    """

    model: Native
    sites: list[SiteStatistics]
    samples: int
    skipped: list[int]
    standard_error: float
    enough: bool | None = None


def drift(before: tuple[Vector, Vector], after: tuple[Vector, Vector], eps: float) -> Drift | None:
    """Symmetric KL divergence between the old and new Gaussian of every channel (Li et al. 2016, AdaBN).

    ``KL(p,q) + KL(q,p) = ((vp + d^2)/vq + (vq + d^2)/vp)/2 - 1``, with ``d = mean_p - mean_q`` and ``v = var + eps``: the
    layer divides by ``sqrt(var + eps)``, so that is its scale, and a channel without variance has a finite drift.

    Args:
        before: mean and variance, float64 (C,).
        after: the same, after.
        eps: of the layer.

    Returns:
        None where the old statistics are not finite, or negative as a variance.
    """
    (mean_p, var_p), (mean_q, var_q) = before, after
    if not (np.isfinite(mean_p).all() and np.isfinite(var_p).all() and (var_p >= 0).all()):
        return None
    if mean_p.size == 0:
        return Drift(0.0, 0.0)
    scale_p, scale_q = (np.maximum(var + eps, _SMALLEST) for var in (var_p, var_q))
    delta2 = np.square(mean_p - mean_q)
    divergence = np.maximum(((scale_p + delta2) / scale_q + (scale_q + delta2) / scale_p) / 2 - 1, 0.0)
    return Drift(float(divergence.mean()), float(divergence.max()))


_SMALLEST = 1e-30
"""Stands for eps where a layer has none: keeps the drift of a constant channel a number."""


def discrepancy(stored: tuple[Vector, Vector], produced: tuple[Vector, Vector], eps: float) -> float:
    """Largest relative difference over channels between stored means and variances and the ones that were produced.

    ``max over c of max(|mean - mean'| / sqrt(var' + eps), |var - var'| / (var' + eps))``, primes for what was produced:
    the error of the normalised activation's mean, in standard deviations, and of its variance, as a ratio.
    """
    mean, var = stored
    produced_mean, produced_var = produced
    scale = np.maximum(produced_var + eps, _SMALLEST)
    shift = np.abs(mean - produced_mean) / np.sqrt(scale)
    spread = np.abs(var - produced_var) / scale
    return float(max(shift.max(initial=0.0), spread.max(initial=0.0)))


def count_dead(moments: Moments, resolution: float) -> int:
    """Number of channels whose standard deviation is lost in the rounding of their mean.

    Args:
        moments: of the site.
        resolution: machine epsilon of the activation's dtype; a channel is dead where ``sd <= resolution * |mean|``.
    """
    return int((np.sqrt(moments.variance()) <= resolution * np.abs(moments.mean)).sum())
