"""What a site sees of a torch activation: moments in float64 on its own device, without a float64 copy of the whole."""

from __future__ import annotations

import numpy as np
import torch

from bnctl.numerics.moments import Moments, merge_all
from bnctl.recalibration.seen import Seen

CHUNK_ELEMENTS = 1 << 18
"""Values that are widened to float64 at a time: 2 MB, so a chunk stays in a cache."""

CHUNK_ELEMENTS_CUDA = 1 << 26
"""The same on a GPU, where each chunk costs the start of some kernels: 512 MB."""


def activation_seen(x: torch.Tensor, *, per_instance: bool = False, chunk_elements: int | None = None) -> Seen:
    """Moments per channel of an activation, over samples and positions, and those of the samples' means.

    With the mean p of the first sample as a pivot, over all n values ``d = x - p``: ``mean = p + sum(d)/n`` and
    ``m2 = sum(d**2) - sum(d)**2/n``. The difference cannot cancel more than ``(mean - p)**2 / var <= N``, since the first
    sample's mean is off by that much at most: with N samples, log2(N) of 53 bits. (With p = 0, which is E[x^2] - E[x]^2,
    there is no such bound.)

    Args:
        x: (N, C, ...), floating point.
        per_instance: the moments that instance normalisation averages: of each sample on its own, the mean over samples
            of their means and of their variances.
        chunk_elements: upper bound of what is held in float64, as far as one channel of one sample allows.
    """
    samples, channels = x.shape[:2]
    if chunk_elements is None:
        chunk_elements = CHUNK_ELEMENTS_CUDA if x.is_cuda else CHUNK_ELEMENTS
    if per_instance:
        alone = activation_seen(x.reshape(1, samples * channels, *x.shape[2:]), chunk_elements=chunk_elements).values
        rows = list(zip(alone.mean.reshape(samples, channels), alone.m2.reshape(samples, channels), strict=True))
        nothing = Moments(0, np.zeros(channels), np.zeros(channels))
        values = merge_all([nothing, *(Moments(alone.count, *row) for row in rows)], between=False)
        return Seen(values, merge_all([nothing, *(Moments(1, mean, np.zeros(channels)) for mean, _ in rows)]))
    positions = x[:1, :1].numel() if x.numel() else 0
    count = samples * positions
    if not count:
        nothing = Moments(0, np.zeros(channels), np.zeros(channels))
        return Seen(nothing, nothing)
    x = x.detach()
    pivot = x[0].reshape(channels, positions).to(torch.float64).mean(1)
    of_samples, squares = _sums(x, pivot, positions, chunk_elements)
    total = of_samples.sum(0)
    means = of_samples / positions
    summed = torch.stack([pivot, total, squares, means.sum(0), means.square().sum(0)])
    p, total_, squares_, means_, square_means = summed.cpu().numpy()
    return Seen(_shifted(count, p, total_, squares_), _shifted(samples, p, means_, square_means))


def _sums(x: torch.Tensor, pivot: torch.Tensor, positions: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of ``x - pivot`` per sample and channel, (N, C), and of its square per channel, (C,), in float64."""
    samples, channels = x.shape[:2]
    by_samples = max(1, chunk // (channels * positions))
    by_channels = channels if by_samples > 1 else min(channels, max(1, chunk // positions))
    sums = x.new_empty((samples, channels), dtype=torch.float64)
    squares = torch.zeros_like(pivot)
    buffer = x.new_empty(min(by_samples, samples) * by_channels * positions, dtype=torch.float64)
    for n in range(0, samples, by_samples):
        for c in range(0, channels, by_channels):
            block = x[n : n + by_samples, c : c + by_channels]
            here = slice(c, c + block.shape[1])
            wide = buffer[: block.numel()].view(block.shape)
            wide.copy_(block)
            wide = wide.view(*block.shape[:2], positions)
            wide -= pivot[here, None]
            sums[n : n + by_samples, here] = wide.sum(2)
            squares[here] += wide.square_().sum((0, 2))
    return sums, squares


def _shifted(count: int, pivot: np.ndarray, total: np.ndarray, squares: np.ndarray) -> Moments:
    """Moments from sums of deviations from a pivot; rounding may not make a sum of squares negative."""
    return Moments(count, pivot + total / count, np.maximum(squares - total * total / count, 0.0))
