"""BatchNorm as an affine map, and the BatchNorm that computes nothing.

In inference (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 2)

    y = gamma * (x - mean) / sqrt(var + eps) + beta = scale * x + shift
    scale = gamma / sqrt(var + eps),   shift = beta - mean * scale

All arrays are float64 of shape (C,).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def affine_of(
    mean: Vector, var: Vector, eps: float, gamma: Vector | None = None, beta: Vector | None = None
) -> tuple[Vector, Vector]:
    """Scale and shift of a BatchNorm in inference; gamma defaults to 1 and beta to 0.

    Raises:
        ValueError: var + eps is not positive somewhere, so that the layer computes NaN or infinity there.
    """
    mean = np.asarray(mean, np.float64)
    spread = np.asarray(var, np.float64) + float(eps)
    if not np.all(spread > 0):
        raise ValueError(f"var + eps is not positive in {int(np.sum(~(spread > 0)))} of {spread.size} channels")
    scale = (1.0 if gamma is None else np.asarray(gamma, np.float64)) / np.sqrt(spread)
    shift = (0.0 if beta is None else np.asarray(beta, np.float64)) - mean * scale
    return scale, shift


def identity_parameters(mean: Vector, var: Vector, eps: float) -> tuple[Vector, Vector]:
    """Gamma and beta with which a BatchNorm that holds these statistics is the identity.

        gamma = sqrt(var + eps),   beta = mean

    Not ``gamma = sqrt(var)``: the layer divides by ``sqrt(var + eps)``.
    """
    return np.sqrt(np.asarray(var, np.float64) + float(eps)), np.asarray(mean, np.float64).copy()
