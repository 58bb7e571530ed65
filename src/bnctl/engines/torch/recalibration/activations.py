"""What a site sees of a torch activation: moments in float64 on its own device, without a float64 copy of the whole."""

from __future__ import annotations

import torch

from bnctl.recalibration.seen import Seen

CHUNK_ELEMENTS = 1 << 19
"""Values that are widened to float64 at a time: 4 MB, so a chunk stays in a cache."""

CHUNK_ELEMENTS_CUDA = 1 << 26
"""The same on a GPU, where each chunk costs the start of some kernels: 512 MB."""


def activation_seen(x: torch.Tensor, *, per_instance: bool = False, chunk_elements: int | None = None) -> Seen:
    """Moments per channel of an activation, over samples and positions, in float64: those of each sample around its own mean, in two passes, and then all at
    once (:meth:`Seen.of_groups`). What a sample contributes does not depend on who else is in its batch.

    Args:
        x: (N, C, ...), floating point.
        per_instance: the moments that instance normalisation averages: variances within samples only.
        chunk_elements: upper bound of what is held in float64, as far as one channel of one sample allows.
    """
    samples, channels = x.shape[:2]
    positions = x[:1, :1].numel() if x.numel() else 0
    if not samples * positions:
        return Seen.nothing(channels)
    if chunk_elements is None:
        chunk_elements = CHUNK_ELEMENTS_CUDA if x.is_cuda else CHUNK_ELEMENTS
    means, squares = (part.cpu().numpy() for part in _of_groups(x.detach(), positions, chunk_elements))
    return Seen.of_groups(means, squares, positions, between=not per_instance)


def _of_groups(x: torch.Tensor, positions: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each channel of each sample, and the sum of the squares around it, (N, C) each, in float64."""
    samples, channels = x.shape[:2]
    if positions == 1:
        means = x.reshape(samples, channels).to(torch.float64)
        return means, torch.zeros_like(means)
    by_samples = min(samples, max(1, chunk // (channels * positions)))
    by_channels = channels if by_samples > 1 else min(channels, max(1, chunk // positions))
    means, squares = x.new_empty((2, samples, channels, 1), dtype=torch.float64)
    buffer = x.new_empty(by_samples * by_channels * positions, dtype=torch.float64)
    for n in range(0, samples, by_samples):
        for c in range(0, channels, by_channels):
            here = slice(n, n + by_samples), slice(c, c + by_channels)
            block = x[here]
            wide = buffer[: block.numel()].view(*block.shape[:2], positions)
            wide.view_as(block).copy_(block)
            wide -= torch.mean(wide, 2, keepdim=True, out=means[here])
            torch.sum(wide.square_(), 2, keepdim=True, out=squares[here])
    return means[..., 0], squares[..., 0]
