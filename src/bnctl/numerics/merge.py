"""Kernels of parallel linear operators in one common frame, to be added: ``(groups, out, in, *kernel)``, float64."""

from __future__ import annotations

import numpy as np

from bnctl.graph.affine import Array


def placed(weight: Array, offset: tuple[int, ...], kernel: tuple[int, ...]) -> Array:
    """A kernel inside a larger one of zeros, beginning at ``offset``; the leading three axes stay."""
    frame = np.zeros((*weight.shape[:3], *kernel))
    index: list[slice] = [slice(None)] * 3
    index += [slice(o, o + n) for o, n in zip(offset, weight.shape[3:], strict=True)]
    frame[tuple(index)] = weight
    return frame


def diagonal(scale: Array, groups: int, spatial: int) -> Array:
    """The kernel of size one of ``scale * x``: ``(groups, c, c, 1, ...)`` with ``groups * c`` channels."""
    blocks = scale.reshape(groups, -1)
    return (blocks[:, :, None] * np.eye(blocks.shape[1])).reshape(*blocks.shape, blocks.shape[1], *[1] * spatial)
