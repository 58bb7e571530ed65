"""What a site sees of an activation: moments in float64, without a float64 copy of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.recalibration.seen import Seen

CHUNK_ELEMENTS = 1 << 16
"""Values that are widened to float64 at a time: 0.5 MB, so a chunk stays in a processor's cache."""


def activation_seen(x: NDArray[Any], axis: int = 1, *, chunk_elements: int = CHUNK_ELEMENTS) -> Seen:
    """Moments per channel of an activation, over samples and positions: those of each sample around its own mean, in two passes, and then all at once
    (:meth:`Seen.of_groups`).

    Args:
        x: samples on axis 0; floating point.
        axis: of the channels, not 0.
        chunk_elements: upper bound of what is held in float64, as far as one channel of one sample allows.

    Returns:
        Moments with shape (C,), NaN or infinite where `x` is.
    """
    by_channel = np.moveaxis(x, axis, 1) if x.ndim > 1 else x[:, None]  # one axis: samples of a single channel
    samples, channels = by_channel.shape[:2]
    if not x.size:
        return Seen.nothing(channels)
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
    shape = 1, samples, channels
    return Seen.of_groups(means.reshape(shape), squares.reshape(shape), positions)[0]
