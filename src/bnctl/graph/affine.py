"""Affine maps of a value, element by element: ``y = scale * x + shift``.

``scale`` and ``shift`` are float64 arrays of the value's rank, each axis of size 1 (constant along it) or the value's size. This says more than a
vector and an axis: a reshape or a permutation acts on the map as it acts on the value, so that no rule has to follow "the channel axis" by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Shape = tuple[int | str | None, ...]
"""Sizes; a name for a symbolic size, None for an unknown one."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``y = scale * x + shift``; both arrays have the rank of x and broadcast against it."""

    scale: Array
    shift: Array

    @classmethod
    def along(cls, axis: int, rank: int, scale: Array, shift: Array) -> AffineMap:
        """A map that varies along one axis of a value of this rank; ``scale`` and ``shift`` are vectors."""
        shape = [1] * rank
        shape[axis] = -1
        return cls(np.asarray(scale, np.float64).reshape(shape), np.asarray(shift, np.float64).reshape(shape))

    @classmethod
    def broadcast(cls, rank: int, scale: Array, shift: Array) -> AffineMap:
        """A map from arrays of lower rank, aligned at the last axis as numpy does."""
        return cls(
            *(np.asarray(a, np.float64).reshape([1] * (rank - np.ndim(a)) + list(np.shape(a))) for a in (scale, shift))
        )

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.scale.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Per axis 1, or the size along which the map varies."""
        return np.broadcast_shapes(self.scale.shape, self.shift.shape)

    def then(self, other: AffineMap) -> AffineMap:
        """``other(self(x))``."""
        return AffineMap(other.scale * self.scale, other.scale * self.shift + other.shift)

    def conjugate(self, inner: AffineMap) -> AffineMap | None:
        """The map M' with ``inner(M'(x)) == self(inner(x))``, or None where there is none.

        With inner = (m, b) and self = (s, t):  s' = s,  t' = (s*b + t - b) / m.  Where m is 0, inner is constant and the numerator must be 0.
        """
        return self._through(inner, (self.scale * inner.shift + self.shift - inner.shift), inner.scale)

    def push(self, outer: AffineMap) -> AffineMap:
        """The map M' with ``M'(outer(x)) == outer(self(x))``:  s' = s,  t' = m*t + b - s*b."""
        return AffineMap(self._spread(outer), outer.scale * self.shift + outer.shift - self.scale * outer.shift)

    def _through(self, inner: AffineMap, moved: Array, factor: Array) -> AffineMap | None:
        moved, factor = np.broadcast_arrays(moved, factor)
        if np.any((factor == 0) & (moved != 0)):
            return None
        return AffineMap(self._spread(inner), np.divide(moved, factor, out=np.zeros_like(moved), where=factor != 0))

    def _spread(self, other: AffineMap) -> Array:
        return np.broadcast_to(self.scale, np.broadcast_shapes(self.scale.shape, other.shape)).copy()

    def permuted(self, axes: tuple[int, ...]) -> AffineMap:
        """The map of ``y.transpose(axes)`` where this is the map of y."""
        return AffineMap(self.scale.transpose(axes), self.shift.transpose(axes))

    def reshaped(self, old: Shape, new: Shape) -> AffineMap | None:
        """The map of ``y.reshape(new)`` where y has shape ``old`` and this map; None where an unknown size stands in the way."""
        scale, shift = _reshape(self.scale, old, new), _reshape(self.shift, old, new)
        return None if scale is None or shift is None else AffineMap(scale, shift)

    def split(self, axis: int, sizes: list[int]) -> list[AffineMap]:
        """The maps of the parts along an axis."""
        ends = np.cumsum(sizes)[:-1].tolist()
        if self.shape[axis] == 1:
            return [self] * len(sizes)
        full = list(self.shape)
        arrays = [np.split(np.broadcast_to(a, full), ends, axis) for a in (self.scale, self.shift)]
        return [AffineMap(s, t) for s, t in zip(*arrays, strict=True)]

    def take(self, axis: int, positions: Sequence[int]) -> AffineMap:
        """The map of ``y.take(positions, axis)`` where this is the map of y."""
        arrays = (a if a.shape[axis] == 1 else a.take(positions, axis) for a in (self.scale, self.shift))
        return AffineMap(*map(_squeeze, arrays))

    def put(self, axis: int, positions: Sequence[int], size: int) -> AffineMap | None:
        """The map M of x with ``M(x).take(positions, axis) == self(x.take(positions, axis))`` that is the identity on all other elements.

        x has this size along the axis. None where an element is taken twice, and the map differs.
        """
        arrays = [_put(a, axis, positions, size, rest) for a, rest in ((self.scale, 1.0), (self.shift, 0.0))]
        return None if arrays[0] is None or arrays[1] is None else AffineMap(arrays[0], arrays[1])

    def expanded(self, axes: tuple[int, ...]) -> AffineMap:
        """With new axes of size one, at these places of the result."""
        return AffineMap(np.expand_dims(self.scale, axes), np.expand_dims(self.shift, axes))

    def squeezed(self, axes: tuple[int, ...]) -> AffineMap:
        """Without these axes, along which it does not vary."""
        return AffineMap(self.scale.squeeze(axes), self.shift.squeeze(axes))

    def aligned(self, rank: int) -> AffineMap:
        """The map of a value of higher rank against which the mapped one is broadcast."""
        return AffineMap.broadcast(rank, self.scale, self.shift)

    def narrowed(self, shape: Shape | None) -> AffineMap | None:
        """The map on a value of this shape that is broadcast to the mapped one; None where the map varies along an axis that the value lacks."""
        if shape is None:
            return None
        lead = self.rank - len(shape)
        if self.shape != (1,) * lead + tuple(
            n if n == size else 1 for n, size in zip(self.shape[lead:], shape, strict=True)
        ):
            return None
        return AffineMap(self.scale.squeeze(tuple(range(lead))), self.shift.squeeze(tuple(range(lead))))

    def rearranged(self, split: tuple[Shape, ...], axes: tuple[int, ...], merged: tuple[int, ...]) -> AffineMap | None:
        """The map after a :class:`~bnctl.graph.ops.Rearrange`; None where it would vary along an axis of unknown size."""
        scale, shift = (_rearrange(a, split, axes, merged) for a in (self.scale, self.shift))
        return None if scale is None or shift is None else AffineMap(scale, shift)

    def fixes(self, value: Array | float | None) -> bool:
        """Whether it maps a constant to itself; an unknown one, only if it is the identity."""
        return self.identity or (value is not None and bool(np.all(self.scale * value + self.shift == value)))

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return bool(np.all(self.scale == 1) and np.all(self.shift == 0))

    @property
    def linear(self) -> AffineMap:
        """The same without the shift."""
        return AffineMap(self.scale, np.zeros((1,) * self.rank))

    def vectors(self, axis: int, size: int) -> tuple[Array, Array] | None:
        """Scale and shift as vectors of this size, or None where the map varies along any other axis."""
        axis %= self.rank
        if any(n != 1 for i, n in enumerate(self.shape) if i != axis) or self.shape[axis] not in {1, size}:
            return None
        return tuple(np.broadcast_to(a.reshape(-1), (size,)).copy() for a in (self.scale, self.shift))  # type: ignore[return-value]

    @property
    def finite(self) -> bool:
        """No NaN and no infinity."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())


def _name_common_unknown(old: Shape, new: Shape) -> tuple[Shape, Shape]:
    """Where each side has one unknown size and the known sizes have equal products, the unknown sizes are equal: give them one name."""
    unknown = [[i for i, n in enumerate(shape) if not isinstance(n, int)] for shape in (old, new)]
    known = [math.prod(n for n in shape if isinstance(n, int)) for shape in (old, new)]
    if [len(u) for u in unknown] != [1, 1] or known[0] != known[1]:
        return old, new
    return tuple("?" if i in unknown[0] else n for i, n in enumerate(old)), tuple(
        "?" if i in unknown[1] else n for i, n in enumerate(new)
    )


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The finest blocks of axes that a reshape keeps apart: ``(2,3,8) -> (6,8)`` gives ``[0,1]->[0]`` and ``[2]->[1]``.

    Sizes are compared from the left; from the first that cannot be (two unknown sizes of different names) on, all axes are one block.
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        if isinstance(old[i], str) and old[i] == new[j]:
            blocks.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        first, a, b, left, right = (i, j), 1, 1, i, j
        while True:
            grow_old = a <= b if left < len(old) else False
            size = old[left] if grow_old else new[right] if right < len(new) else None
            if not isinstance(size, int):
                return [*blocks, (list(range(first[0], len(old))), list(range(first[1], len(new))))]
            if grow_old:
                left, a = left + 1, a * size
            else:
                right, b = right + 1, b * size
            if a == b and left > first[0] and right > first[1]:
                break
        blocks.append((list(range(i, left)), list(range(j, right))))
        i, j = left, right
    if i < len(old) or j < len(new):  # what is left are axes of size one
        blocks.append((list(range(i, len(old))), list(range(j, len(new)))))
    return blocks


def _reshape(array: Array, old: Shape, new: Shape) -> Array | None:
    old, new = _name_common_unknown(old, new)
    expanded, target = [1] * len(old), [1] * len(new)
    for left, right in _blocks(old, new):
        if all(array.shape[i] == 1 for i in left):
            continue
        for axes, shape, sizes in ((left, old, expanded), (right, new, target)):
            for axis in axes:
                size = shape[axis]
                if not isinstance(size, int):
                    return None
                sizes[axis] = size
    return _squeeze(np.broadcast_to(array, expanded).reshape(target))


def _put(array: Array, axis: int, positions: Sequence[int], size: int, rest: float) -> Array | None:
    given = np.repeat(array, len(positions), axis) if array.shape[axis] == 1 else array
    full = np.full([*array.shape[:axis], size, *array.shape[axis + 1 :]], rest)
    full[(slice(None),) * axis + (list(positions),)] = given
    return _squeeze(full) if np.array_equal(full.take(positions, axis), given) else None


def _rearrange(array: Array, split: tuple[Shape, ...], axes: tuple[int, ...], merged: tuple[int, ...]) -> Array | None:
    apart = [1 if n == 1 else factor for n, factors in zip(array.shape, split, strict=True) for factor in factors]
    if not all(isinstance(n, int) for n in apart):
        return None
    array = _squeeze(array.reshape([n for n in apart if isinstance(n, int)])).transpose(axes)
    sizes = [factor for factors in split for factor in factors]
    full: list[int] = []
    new: list[int] = []
    for end, count in zip(np.cumsum(merged).tolist(), merged, strict=True):
        varies = any(n != 1 for n in array.shape[end - count : end])
        group = [sizes[a] if varies else 1 for a in axes[end - count : end]]
        if not all(isinstance(n, int) for n in group):
            return None
        known = [n for n in group if isinstance(n, int)]
        full += known
        new.append(math.prod(known))
    return _squeeze(np.broadcast_to(array, full).reshape(new))


def _squeeze(array: Array) -> Array:
    """Back to size one along every axis on which nothing varies."""
    for axis, size in enumerate(array.shape):
        first = array.take([0], axis) if size > 1 else array
        if size > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array
