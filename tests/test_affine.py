"""AffineMap against brute force on arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bnctl.graph.affine import AffineMap
from bnctl.graph.ops import Rearrange

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def maps(draw: Any, shape: tuple[int, ...] | None = None) -> tuple[AffineMap, np.ndarray]:
    """A map that varies along some axes, and a value for it; zeros among the scales."""
    shape = shape or draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    own = [tuple(n if draw(st.booleans()) else 1 for n in shape) for _ in range(2)]
    scale = rng.integers(-2, 3, own[0]).astype(float)
    return AffineMap(scale, rng.normal(size=own[1])), rng.normal(size=shape)


def apply(m: AffineMap, x: np.ndarray) -> np.ndarray:
    return m.scale * x + m.shift


def factorings(n: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of n elements."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return st.lists(st.sampled_from(divisors), max_size=3).map(
        lambda ds: (*ds, n // math.prod(ds)) if n % math.prod(ds) == 0 else (n,)
    )


@SETTINGS
@given(st.data())
def test_then_push_and_conjugate(data: Any) -> None:
    m, x = data.draw(maps())
    other, _ = data.draw(maps(x.shape))
    assert np.allclose(apply(m.then(other), x), apply(other, apply(m, x)))
    assert np.allclose(apply(m.push(other), apply(other, x)), apply(other, apply(m, x)))
    moved = m.conjugate(other)  # other(moved(x)) == m(other(x))
    if moved is None:
        assert np.any(other.scale == 0)
    else:
        assert np.allclose(apply(other, apply(moved, x)), apply(m, apply(other, x)))


@SETTINGS
@given(st.data())
def test_reshape_commutes(data: Any) -> None:
    m, x = data.draw(maps())
    new = data.draw(factorings(x.size))
    moved = m.reshaped(x.shape, new)
    assert moved is not None
    assert moved.rank == len(new)
    assert np.allclose(apply(moved, x.reshape(new)), apply(m, x).reshape(new))


@SETTINGS
@given(st.data())
def test_permute_split_and_vectors(data: Any) -> None:
    m, x = data.draw(maps())
    axes = tuple(data.draw(st.permutations(range(x.ndim))))
    assert np.allclose(apply(m.permuted(axes), x.transpose(axes)), apply(m, x).transpose(axes))
    axis = data.draw(st.integers(0, x.ndim - 1))
    cut = data.draw(st.integers(0, x.shape[axis]))
    parts = m.split(axis, [cut, x.shape[axis] - cut])
    whole = np.concatenate([apply(p, v) for p, v in zip(parts, np.split(x, [cut], axis), strict=True)], axis)
    assert np.allclose(whole, apply(m, x))
    vectors = m.vectors(axis, x.shape[axis])
    if vectors is not None:
        assert np.allclose(apply(AffineMap.along(axis, x.ndim, *vectors), x), apply(m, x))
    else:
        assert any(n != 1 for i, n in enumerate(m.shape) if i != axis)


@SETTINGS
@given(st.data())
def test_put_and_take(data: Any) -> None:
    m, x = data.draw(maps())
    axis = data.draw(st.integers(0, x.ndim - 1))
    size = data.draw(st.integers(1, 5))
    at = data.draw(st.lists(st.integers(0, size - 1), min_size=x.shape[axis], max_size=x.shape[axis]))
    whole = np.random.default_rng(0).normal(size=[*x.shape[:axis], size, *x.shape[axis + 1 :]])
    moved = m.put(axis, at, size)
    if moved is None:
        assert len(set(at)) < len(at)  # an element is taken twice, and the map differs
    else:
        assert np.allclose(apply(moved, whole).take(at, axis), apply(m, whole.take(at, axis)))
        rest = [i for i in range(size) if i not in at]
        assert np.array_equal(apply(moved, whole).take(rest, axis), whole.take(rest, axis))
        assert np.allclose(apply(moved.take(axis, at), whole.take(at, axis)), apply(m, whole.take(at, axis)))


@SETTINGS
@given(st.data())
def test_rearrange_commutes(data: Any) -> None:
    m, x = data.draw(maps())
    split = tuple(data.draw(factorings(n)) for n in x.shape)
    factors = [n for axis in split for n in axis]
    axes = tuple(data.draw(st.permutations(range(len(factors)))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    merged = tuple(np.diff([0, *cuts, len(factors)]).tolist())
    op = Rearrange(split, axes, merged)

    def rearrange(y: np.ndarray, op: Rearrange) -> np.ndarray:
        apart = y.reshape([n for axis in op.split for n in axis]).transpose(op.axes)  # type: ignore[misc]
        ends = np.cumsum(op.merged).tolist()
        return apart.reshape([math.prod(apart.shape[e - n : e]) for e, n in zip(ends, op.merged, strict=True)])

    moved = m.rearranged(op.split, op.axes, op.merged)
    assert moved is not None
    assert np.allclose(apply(moved, rearrange(x, op)), rearrange(apply(m, x), op))
    assert np.array_equal(rearrange(rearrange(x, op), op.inverse), x)


@SETTINGS
@given(st.data())
def test_narrowed_is_the_map_before_broadcasting(data: Any) -> None:
    m, x = data.draw(maps())
    lead = data.draw(st.integers(0, x.ndim - 1))
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in x.shape[lead:])
    small = np.random.default_rng(1).normal(size=shape)
    moved = m.narrowed(shape)
    if moved is None:
        assert m.shape != np.broadcast_shapes(*(shape, (1,) * m.rank)) or any(n > 1 for n in m.shape)
    else:
        assert np.allclose(np.broadcast_to(apply(moved, small), x.shape), apply(m, np.broadcast_to(small, x.shape)))
        assert np.allclose(apply(moved.aligned(x.ndim), x), apply(m, x))


def test_what_a_map_fixes() -> None:
    m = AffineMap(np.array([2.0, 1.0]), np.array([-3.0, 0.0]))
    assert m.fixes(3.0) and m.fixes(np.array([3.0, 7.0]))
    assert not m.fixes(0.0) and not m.fixes(None)
    assert AffineMap(np.ones(2), np.zeros(2)).fixes(None)


def test_a_factor_of_unknown_size_stays_apart() -> None:
    shuffle = Rearrange.depth_to_space(("N", 8, None, "W"), 2, depth_first=False)
    vary = AffineMap.along(1, 4, np.arange(8.0), np.zeros(8))
    assert (
        vary.rearranged(shuffle.split, shuffle.axes, shuffle.merged) is None
    )  # it would vary over a height that is not known
    alike = AffineMap.along(1, 4, np.repeat([1.0, 2.0], 4), np.zeros(8))
    moved = alike.rearranged(shuffle.split, shuffle.axes, shuffle.merged)
    assert moved is not None and np.array_equal(moved.scale.reshape(-1), [1, 2])
    back = moved.rearranged(shuffle.inverse.split, shuffle.inverse.axes, shuffle.inverse.merged)
    assert back is not None and np.array_equal(back.scale, alike.scale)


def test_unknown_sizes() -> None:
    m = AffineMap.along(1, 4, np.arange(6.0), np.ones(6))
    flat = m.reshaped((None, 6, 2, 2), (None, 24))
    assert flat is not None
    assert np.array_equal(flat.scale, np.repeat(np.arange(6.0), 4)[None])
    assert m.reshaped(("n", 6, 2, 2), ("k", 3, 4)) is None  # n is not k, and k mixes samples and channels
    renamed = m.reshaped(("n", 6, 2, 2), ("k", 6, 4))  # equal numbers of elements: n is k
    assert renamed is not None
    assert renamed.shape == (1, 6, 1)
    shuffled = m.reshaped(("n", 6, 2, 2), ("n", 2, 3, 2, 2))
    assert shuffled is not None
    assert shuffled.shape == (1, 2, 3, 1, 1)


def test_a_map_on_the_wrong_axis_is_caught() -> None:
    m = AffineMap.along(1, 3, np.arange(3.0), np.zeros(3))
    x = np.ones((2, 3, 3))
    assert not np.allclose(apply(m.permuted((0, 2, 1)), x), apply(m, x))
