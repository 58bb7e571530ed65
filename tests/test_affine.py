"""AffineMap against brute force on arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bnctl.graph.affine import AffineMap

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
