"""Moments of a torch activation, in float64 on its own device, without a float64 copy of the whole."""

from __future__ import annotations

import numpy as np
import torch

from bnctl.numerics.moments import Moments, merge_all

CHUNK_ELEMENTS = 1 << 18
"""Values that are widened to float64 at a time: 2 MB, so a chunk stays in a processor's cache."""


def activation_moments(x: torch.Tensor, *, per_instance: bool = False, chunk_elements: int = CHUNK_ELEMENTS) -> Moments:
    """Moments per channel of an activation: over samples and positions, in two passes.

    Args:
        x: (N, C, ...), floating point.
        per_instance: the moments that instance normalisation averages: of each sample on its own, the mean over samples
            of their means and of their variances.
        chunk_elements: upper bound of what is held in float64, as far as one channel of one sample allows.

    Returns:
        count N times positions; mean and m2 float64 (C,).
    """
    if per_instance:
        samples, channels = x.shape[:2]
        alone = activation_moments(x.reshape(1, samples * channels, *x.shape[2:]), chunk_elements=chunk_elements)
        rows = zip(alone.mean.reshape(samples, channels), alone.m2.reshape(samples, channels), strict=True)
        nothing = Moments(0, np.zeros(channels), np.zeros(channels))
        return merge_all([nothing, *(Moments(alone.count, *row) for row in rows)], between=False)
    positions = x[:1, :1].numel()
    blocks = [
        merge_all(_two_passes(part) for part in block.split(max(1, chunk_elements // max(block[:1].numel(), 1))))
        for block in x.split(max(1, chunk_elements // max(positions, 1)), dim=1)
    ]
    mean, m2 = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("mean", "m2"))
    return Moments(blocks[0].count, mean, m2)


def _two_passes(x: torch.Tensor) -> Moments:
    wide = x.detach().to(torch.float64, copy=True)
    over = [axis for axis in range(x.ndim) if axis != 1]
    count = x.numel() // max(x.shape[1], 1)
    mean = wide.sum(over) / max(count, 1)
    wide -= mean.reshape(-1, *[1] * (x.ndim - 2))
    return Moments(count, mean.cpu().numpy(), wide.square_().sum(over).cpu().numpy())
