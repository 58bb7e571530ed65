"""The vocabulary of the normalised graph: what an operator does to channels, and nothing else.

Both engines translate their native operators into these few classes; the rules of :mod:`bnctl.plan` are written on them. An operator that is none
of these is :class:`Opaque`: nothing moves through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnctl.codes import Obstacle
from bnctl.graph.affine import AffineMap

Array = NDArray[np.float64]


@dataclass(frozen=True)
class WeightLayout:
    """How a linear operator stores its weight, and the way to ``(groups, out, in, *kernel)`` and back.

    Args:
        groups: number of independent blocks of channels.
        out_first: True for Conv ``(Cout, Cin/groups, *k)`` and Linear ``(out, in)``; False for ConvTranspose ``(Cin, Cout/groups, *k)``,
            MatMul ``(in, out)`` and Embedding ``(entries, features)``.
    """

    groups: int = 1
    out_first: bool = True

    def canonical(self, weight: Array) -> Array:
        """``(groups, out per group, in per group, *kernel)``."""
        blocks = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return blocks if self.out_first else blocks.swapaxes(1, 2)

    def stored(self, canonical: Array) -> Array:
        """The inverse of :meth:`canonical`."""
        blocks = canonical if self.out_first else canonical.swapaxes(1, 2)
        return np.ascontiguousarray(blocks.reshape(-1, *blocks.shape[2:]))

    def channels(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Numbers of input and output channels of a stored weight of this shape."""
        first, second = shape[0], shape[1]
        return (second * self.groups, first) if self.out_first else (first, second * self.groups)


class Op:
    """Base of all operators."""

    @property
    def label(self) -> str:
        """What a message calls this operator."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class LinearOp(Op):
    """A linear operator over channels with constant weights: ``y = weight_factor * W x + bias_factor * b``."""

    layout: WeightLayout
    weight_factor: float = 1.0
    bias_factor: float = 1.0


@dataclass(frozen=True)
class Conv(LinearOp):
    """Convolution, transposed or not, over ``spatial`` axes; channels are the axis before them.

    ``padded`` says whether zeros are put around the input (also by ``auto_pad`` or a string).
    """

    spatial: int = 2
    transposed: bool = False
    padded: bool = False

    @property
    def label(self) -> str:
        """Conv or ConvTranspose."""
        return "conv-transpose" if self.transposed else "conv"


@dataclass(frozen=True)
class Linear(LinearOp):
    """Linear layer, Gemm or MatMul by a constant; channels are the last axis."""


@dataclass(frozen=True)
class Embedding(LinearOp):
    """Lookup in a constant table; the features are the last axis of the output."""


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """``y = scale * x + shift`` with constants that broadcast against x.

    Args:
        map: scale and shift.
        norm: tells a normalisation layer (BatchNorm, FrozenBatchNorm, InstanceNorm with tracked statistics) from a constant Mul, Add, Sub or Div.
        axis: the axis of gamma and beta, where the node has slots for them.
    """

    map: AffineMap
    norm: bool = False
    axis: int = 1

    @property
    def label(self) -> str:
        """A normalisation layer or a plain affine."""
        return "batch norm" if self.norm else "scale/shift"


@dataclass(frozen=True)
class Norm(Op):
    """A normalisation that depends on its input: LayerNorm, GroupNorm, BatchNorm with batch statistics.

    ``obstacle`` is set for a BatchNorm: a site, and the reason why it cannot be folded.
    """

    kind: str
    obstacle: Obstacle | None = None

    @property
    def label(self) -> str:
        """Its native name."""
        return self.kind


@dataclass(frozen=True)
class Activation(Op):
    """A function of each element that is not affine."""

    kind: str

    @property
    def label(self) -> str:
        """Its native name."""
        return self.kind


@dataclass(frozen=True)
class Identity(Op):
    """The value itself: identity, dropout in inference, a copy, a change of memory format."""


@dataclass(frozen=True)
class Reshape(Op):
    """Another shape over the same elements in the same order: reshape, view, flatten, squeeze, unsqueeze."""


@dataclass(frozen=True)
class Permute(Op):
    """``y = x.transpose(axes)``."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Concat(Op):
    """The inputs one behind the other along ``axis``."""

    axis: int


@dataclass(frozen=True)
class Slice(Op):
    """Each output is a contiguous part of the input along ``axis`` (slice, split, chunk, narrow), beginning at ``starts``."""

    axis: int
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Sum(Op):
    """``y = x0 + sign * x1`` of two branches of the same shape."""

    sign: int = 1


@dataclass(frozen=True)
class Average(Op):
    """Weighted means over the last ``spatial`` axes with weights that sum to one everywhere: average pooling, interpolation, padding by reflection."""

    spatial: int


@dataclass(frozen=True)
class Mean(Op):
    """Mean over ``axes``."""

    axes: tuple[int, ...]
    keepdims: bool


@dataclass(frozen=True)
class MaxPool(Op):
    """Maximum over windows of the last ``spatial`` axes."""

    spatial: int


@dataclass(frozen=True)
class ConstantPad(Op):
    """Constants around the input."""


@dataclass(frozen=True)
class Opaque(Op):
    """Anything else: nothing moves through it. ``obstacle`` says why, where there is more to say than that there is no rule."""

    kind: str
    obstacle: Obstacle | None = None

    @property
    def label(self) -> str:
        """Its native name."""
        return self.kind
