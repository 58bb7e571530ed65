"""What a site sees of torch activations: moments in float64 on their own device, without a float64 copy of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bnctl.recalibration.seen import Seen

CHUNK_ELEMENTS = 1 << 19
"""Values that are widened to float64 at a time: 4 MB, so a chunk stays in a cache."""

CHUNK_ELEMENTS_CUDA = 1 << 26
"""The same on a GPU, where each chunk costs the start of some kernels: 512 MB."""


def chunk_of(x: torch.Tensor) -> int:
    """How many values are widened at a time where `x` is."""
    return CHUNK_ELEMENTS_CUDA if x.is_cuda else CHUNK_ELEMENTS


def activation_seen(x: torch.Tensor, *, per_instance: bool = False, chunk_elements: int | None = None) -> Seen:
    """Moments per channel of an activation; see :func:`activations_seen`."""
    return activations_seen([x], per_instance=per_instance, chunk_elements=chunk_elements)[0]


def activations_seen(
    xs: Sequence[torch.Tensor], *, per_instance: bool = False, chunk_elements: int | None = None
) -> list[Seen]:
    """Moments per channel of activations, each over its samples and positions, in float64: those of each sample around its own mean, in two passes, and then
    all at once (:meth:`Seen.of_groups`). What a sample contributes does not depend on who else is in its batch, nor the moments of one activation on others.

    Args:
        xs: at least one; all (N, C, ...) of one shape, floating point, on one device.
        per_instance: the moments that instance normalisation averages: variances within samples only.
        chunk_elements: upper bound of what is held in float64, as far as one channel of one sample allows.
    """
    x = xs[0]
    samples, channels = x.shape[:2]
    positions = x[:1, :1].numel() if x.numel() else 0
    if not samples * positions:
        return [Seen.nothing(channels) for _ in xs]
    chunk = chunk_of(x) if chunk_elements is None else chunk_elements
    with torch.no_grad():
        means, squares = (part.cpu().numpy() for part in _of_groups(xs, positions, chunk))
    return Seen.of_groups(means, squares, positions, between=not per_instance)


def _of_groups(xs: Sequence[torch.Tensor], positions: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each channel of each sample, and the sum of the squares around it, (activations, N, C) each, in float64."""
    x = xs[0]
    samples, channels = x.shape[:2]
    if positions == 1:
        means = torch.stack([x.reshape(samples, channels) for x in xs]).to(torch.float64)
        return means, torch.zeros_like(means)
    means, squares = x.new_empty((2, len(xs), samples, channels, 1), dtype=torch.float64)
    together = min(len(xs), max(1, chunk // x.numel()))
    by_samples = min(samples, max(1, chunk // (channels * positions)))
    by_channels = channels if by_samples > 1 else min(channels, max(1, chunk // positions))
    buffer = x.new_empty(together * by_samples * by_channels * positions, dtype=torch.float64)
    for k in range(0, len(xs), together):
        for n in range(0, samples, by_samples):
            for c in range(0, channels, by_channels):
                here = slice(k, k + together), slice(n, n + by_samples), slice(c, c + by_channels)
                blocks = [x[here[1:]] for x in xs[here[0]]]
                shape = len(blocks), *blocks[0].shape[:2], positions
                wide = buffer[: len(blocks) * blocks[0].numel()].view(shape)
                for block, to in zip(blocks, wide.unbind(), strict=True):
                    to.view(block.shape).copy_(block)
                wide -= torch.mean(wide, 3, keepdim=True, out=means[here])
                torch.sum(wide.square_(), 3, keepdim=True, out=squares[here])
    return means[..., 0], squares[..., 0]
