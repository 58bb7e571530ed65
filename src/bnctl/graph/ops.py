"""The vocabulary of the normalised graph: what an operator does to channels, and nothing else.

Both engines translate their native operators into these few classes; the rules of :mod:`bnctl.plan` are written on them. An operator that is none
of these is :class:`Opaque`: nothing moves through it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np

from bnctl.codes import Obstacle
from bnctl.graph.affine import AffineMap, Array, Shape
from bnctl.graph.window import Window


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
    """A linear operator over channels with constant weights: ``y = weight_factor * W x + bias_factor * b``.

    Channels are the axis before the last ``spatial`` ones, of its input as of its output.
    """

    layout: WeightLayout
    weight_factor: float = 1.0
    bias_factor: float = 1.0
    spatial: int = 0


@dataclass(frozen=True)
class Conv(LinearOp):
    """Convolution, transposed or not, over ``spatial`` axes.

    ``padded`` says whether zeros are put around the input (also by ``auto_pad`` or a string); ``window`` is None where that depends on the size of the
    input, and for transposed ones.
    """

    spatial: int = 2
    transposed: bool = False
    padded: bool = False
    window: Window | None = None

    @property
    def label(self) -> str:
        """Conv or ConvTranspose."""
        return "conv-transpose" if self.transposed else "conv"


@dataclass(frozen=True)
class Linear(LinearOp):
    """Linear layer, Gemm, MatMul by a constant on its right; on its left, ``W x`` with channels on the last axis but one."""


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

    ``obstacle`` is set for a BatchNorm: a site, and the reason why it cannot be folded. ``axis`` is that of gamma and beta, where the node has slots for them.
    """

    kind: str
    obstacle: Obstacle | None = None
    axis: int = 1

    @property
    def label(self) -> str:
        """Its native name."""
        return self.kind


@dataclass(frozen=True)
class Activation(Op):
    """A function that is not affine, of each element, or of the elements along ``axis`` together: softmax, whose results sum to one along it."""

    kind: str
    axis: int | None = None

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
class Rearrange(Op):
    """Axes are split into factors, the factors permuted and merged again: pixel shuffle, channel shuffle, squeeze, unsqueeze, flatten.

    What a reshape says by sizes alone is said here axis by axis, so that unknown sizes do no harm.

    Args:
        split: the factors of each axis of the input, whose product is its size; no int where a size is not known.
        axes: where each factor of the output comes from among all factors of the input.
        merged: the number of factors in each axis of the output; an axis of none has size one.
    """

    split: tuple[Shape, ...]
    axes: tuple[int, ...]
    merged: tuple[int, ...]

    @classmethod
    def depth_to_space(cls, shape: Shape, block: int, *, depth_first: bool) -> Rearrange:
        """``(..., C r r, H, W)`` to ``(..., C, H r, W r)``; depth first (DCR of ONNX), the channels are ``(r, r, C)``, otherwise ``(C, r, r)``."""
        *lead, channels, height, width = shape
        k = len(lead)
        depth = channels // block**2 if isinstance(channels, int) else None
        factors = (block, block, depth) if depth_first else (depth, block, block)
        c, r1, r2 = (k + 2, k, k + 1) if depth_first else (k, k + 1, k + 2)
        axes = (*range(k), c, k + 3, r1, k + 4, r2)
        return cls((*((n,) for n in lead), factors, (height,), (width,)), axes, (*[1] * k, 1, 2, 2))

    @property
    def inverse(self) -> Rearrange:
        """The way back."""
        factors = [n for axis in self.split for n in axis]
        ends = np.cumsum(self.merged).tolist()
        split = tuple(
            tuple(factors[a] for a in self.axes[end - count : end])
            for end, count in zip(ends, self.merged, strict=True)
        )
        return Rearrange(split, tuple(int(i) for i in np.argsort(self.axes)), tuple(len(axis) for axis in self.split))


@dataclass(frozen=True, eq=False)
class Concat(Op):
    """The parts one behind the other along ``axis``; ``stacked``, each is a step along a new one.

    ``parts`` has one entry per part: its value where it is constant, None where it is the next input.
    """

    axis: int
    parts: tuple[Array | None, ...]
    stacked: bool = False


Positions = tuple[int, ...] | None
"""Where a selection takes its elements from along one axis, in order, each any number of times; None where that depends on a size that is not known."""


@dataclass(frozen=True, eq=False)
class Select(Op):
    """Each output takes elements of the input: slice, split, index, flip, roll, crop, expand, repeat, padding by reflection.

    Args:
        parts: for each output, the positions along each axis along which it does not simply take all.
        dropped: axes along which one element is taken, and which the outputs do not have.
    """

    parts: tuple[dict[int, Positions], ...]
    dropped: tuple[int, ...] = ()

    @classmethod
    def split(cls, axis: int, sizes: Iterable[int]) -> Select:
        """Contiguous parts of these sizes, one behind the other."""
        ends = list(accumulate(sizes, initial=0))
        return cls(tuple({axis: tuple(range(*ends_of))} for ends_of in pairwise(ends)))


@dataclass(frozen=True)
class Sum(Op):
    """``y = sum(sign * x)`` of branches that are broadcast against each other; a sign is 1 or -1."""

    signs: tuple[int, ...]

    @property
    def label(self) -> str:
        """What a user calls it."""
        return "add"


@dataclass(frozen=True)
class Product(Op):
    """``y = x0 * x1`` of two values that are broadcast against each other."""


@dataclass(frozen=True)
class Extremum(Op):
    """``y = max(x0, x1, ...)``, or the minimum, of values that are broadcast against each other."""

    kind: Literal["max", "min"]

    @property
    def label(self) -> str:
        """What a user calls it."""
        return f"{self.kind}imum"


@dataclass(frozen=True)
class MatMul(Op):
    """``y = a @ b`` of two values: each row of y is a weighted sum of rows of b."""


@dataclass(frozen=True)
class Attention(Op):
    """``y = softmax(...) @ v``, where v is the third input: each row of y is a weighted mean of rows of v."""


@dataclass(frozen=True)
class Average(Op):
    """Weighted sums over the last ``spatial`` axes, with weights that depend on the position alone: average pooling, interpolation.

    They sum to one everywhere, unless it is ``partial``: zeros around the input are counted, or the divisor is another.
    """

    spatial: int
    partial: bool = False


@dataclass(frozen=True)
class Reduce(Op):
    """Mean, sum, maximum or minimum over ``axes``; ``count`` is the number of elements in each, where it is the same for all inputs of the model."""

    kind: Literal["mean", "sum", "max", "min"]
    axes: tuple[int, ...]
    keepdims: bool
    count: int | None = None

    @property
    def label(self) -> str:
        """Mean, sum, max or min."""
        return self.kind


@dataclass(frozen=True)
class MaxPool(Op):
    """Maximum over windows of the last ``spatial`` axes."""

    spatial: int


@dataclass(frozen=True)
class ConstantPad(Op):
    """A constant around the input: ``pads`` are the numbers of elements before and behind, per axis; ``value`` is None where it is not known."""

    pads: tuple[tuple[int, int], ...]
    value: float | None = 0.0


@dataclass(frozen=True)
class Opaque(Op):
    """Anything else: nothing moves through it. ``obstacle`` says why, where there is more to say than that there is no rule."""

    kind: str
    obstacle: Obstacle | None = None

    @property
    def label(self) -> str:
        """Its native name."""
        return self.kind
