"""What a site sees of an activation: moments in float64, without a float64 copy of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.numerics.moments import Moments
from bnctl.recalibration.seen import Seen

CHUNK_ELEMENTS = 1 << 16
"""Values that are widened to float64 at a time: 0.5 MB, so a chunk stays in a processor's cache."""


def activation_seen(x: NDArray[Any], axis: int = 1, *, chunk_elements: int = CHUNK_ELEMENTS) -> Seen:
    """Moments per channel of an activation, over samples and positions, and those of the samples' means.

    Two passes over the P positions of each sample i: ``mean_i = sum(x)/P`` and ``m2_i = sum((x - mean_i)**2)``. Then, over the N samples,
    ``mean = sum(mean_i)/N`` and ``m2 = sum(m2_i) + P sum((mean_i - mean)**2)`` (Chan et al. 1983 for groups of one size).

    Args:
        x: samples on axis 0; floating point.
        axis: of the channels, not 0.
        chunk_elements: upper bound of what is held in float64, as far as one channel of one sample allows.

    Returns:
        Moments with shape (C,), NaN or infinite where `x` is.
    """
    by_channel = np.moveaxis(x, axis, 1)
    samples, channels = by_channel.shape[:2]
    if not x.size:
        nothing = Moments(0, np.zeros(channels), np.zeros(channels))
        return Seen(nothing, nothing)
    rows = by_channel.reshape(samples * channels, -1)
    positions = rows.shape[1]
    means, squares = np.empty(len(rows)), np.empty(len(rows))
    with np.errstate(invalid="ignore", over="ignore"):  # the caller looks at the result
        step = max(1, chunk_elements // positions)
        buffer = np.empty((step, positions))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            wide = buffer[: len(part)]
            np.copyto(wide, part)
            mean = wide.sum(axis=1) / positions
            wide -= mean[:, None]
            means[first : first + step] = mean
            squares[first : first + step] = np.einsum("ij,ij->i", wide, wide)
        of_samples = Moments.of(means.reshape(samples, channels))
        m2 = squares.reshape(samples, channels).sum(axis=0) + positions * of_samples.m2
    return Seen(Moments(samples * positions, of_samples.mean, m2), of_samples)
