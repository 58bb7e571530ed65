"""Moments: merged pieces are the whole, and nothing is lost to cancellation."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import reduce
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bnctl.engines.torch.recalibration.activations import activation_seen, activations_seen
from bnctl.numerics.moments import Moments

VALUES = st.floats(-1e3, 1e3, width=32)


def assert_same(a: Moments, b: Moments, *, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(a.m2, b.m2, rtol=rtol, atol=atol)


def merge_all(parts: Iterable[Moments]) -> Moments:
    return reduce(Moments.merge, parts)


def exact(column: np.ndarray) -> tuple[float, float]:
    """Mean and m2 in rational arithmetic."""
    numbers = [Fraction(float(value)) for value in column]
    mean = sum(numbers) / len(numbers)
    return float(mean), float(sum((value - mean) ** 2 for value in numbers))


@given(npst.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=VALUES))
def test_of_agrees_with_rational_arithmetic(x: np.ndarray) -> None:
    moments = Moments.of(x)
    for channel in range(x.shape[1]):
        mean, m2 = exact(x[:, channel])
        assert moments.mean[channel] == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert moments.m2[channel] == pytest.approx(m2, rel=1e-9, abs=1e-9)


@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4)), elements=VALUES),
    st.lists(st.integers(0, 20), max_size=6),
)
def test_any_partition_merges_to_the_whole(x: np.ndarray, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    parts = [Moments.of(x[a:b]) for a, b in pairwise(edges)]  # some of them empty
    assert_same(merge_all(parts), Moments.of(x), atol=1e-7)


@given(st.lists(npst.arrays(np.float64, (4, 2), elements=VALUES), min_size=3, max_size=3))
def test_merge_is_associative_and_commutative(blocks: list[np.ndarray]) -> None:
    a, b, c = map(Moments.of, blocks)
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), atol=1e-7)
    assert_same(a.merge(b), b.merge(a), atol=1e-7)


def test_uneven_batches_weigh_by_their_size() -> None:
    """The negative control: an average of batch means, as update_bn takes, is far off."""
    x = np.concatenate([np.zeros((8, 1)), np.full((1, 1), 9.0)])
    merged = Moments.of(x[:8]).merge(Moments.of(x[8:]))
    assert merged.mean[0] == pytest.approx(1.0)
    assert np.mean([x[:8].mean(), x[8:].mean()]) == pytest.approx(4.5)


def test_mean_much_larger_than_standard_deviation() -> None:
    """The negative control: E[x^2] - E[x]^2 gives nonsense on the same numbers."""
    x = 1e6 + 1e-2 * np.random.default_rng(0).standard_normal((1000, 1))
    merged = merge_all(Moments.of(part) for part in np.array_split(x, 7))
    truth = exact(x[:, 0])[1] / 1000
    assert merged.variance()[0] == pytest.approx(truth, rel=1e-5)
    assert abs((x**2).mean() - x.mean() ** 2 - truth) > truth / 100


@given(npst.arrays(np.float64, st.tuples(st.integers(1, 9), st.just(1)), elements=st.floats(1e6, 1e6 + 1e-6)))
def test_variance_is_never_negative(x: np.ndarray) -> None:
    assert (merge_all(Moments.of(row[None]) for row in x).variance() >= 0).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.uint8])
def test_narrow_types_are_widened_first(dtype: type) -> None:
    x = (np.random.default_rng(0).random((4096, 2)) * 100 + 100).astype(dtype)
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0))
    np.testing.assert_allclose(moments.variance(), x.astype(np.float64).var(0))


def test_channel_axis() -> None:
    x = np.random.default_rng(0).random((2, 3, 4))
    assert_same(Moments.of(x, axis=-1), Moments.of(np.moveaxis(x, -1, 1)))
    assert Moments.of(x).mean.shape == (3,)


def test_too_few_values_have_no_variance() -> None:
    one = Moments.of(np.ones((1, 2)))
    assert (one.variance() == 0).all()
    with pytest.raises(ValueError, match="1 values without bias"):
        one.variance(unbiased=True)
    with pytest.raises(ValueError, match="0 values"):
        Moments.of(np.ones((0, 2))).variance()
    assert Moments.of(np.array([[1.0], [3.0]])).variance(unbiased=True) == pytest.approx(2.0)


def test_within_leaves_out_the_spread_of_the_means() -> None:
    a, b = np.array([[0.0], [2.0]]), np.array([[10.0], [12.0]])
    assert Moments.of(a).merge(Moments.of(b), between=False).variance() == pytest.approx(1.0)
    assert Moments.of(a).merge(Moments.of(b)).variance() == pytest.approx(26.0)


@settings(deadline=None)
@given(
    st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    st.integers(2, 4),
    st.integers(1, 90),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_activation_moments_do_not_depend_on_chunks(
    shape: tuple[int, ...], ndim: int, chunk: int, dtype: torch.dtype
) -> None:
    x = torch.randn(shape[:ndim], generator=torch.Generator().manual_seed(chunk)).to(dtype)
    kept = x.clone()
    assert_same(activation_seen(x, chunk_elements=chunk).values, Moments.of(x.double().numpy()))
    assert torch.equal(x, kept)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    st.integers(2, 4),
    st.integers(1, 7),
    st.sampled_from([None, 1, 100, 1000]),
)
def test_activations_seen_together_have_the_moments_of_each(
    shape: tuple[int, ...], ndim: int, calls: int, chunk: int | None
) -> None:
    """Bit for bit: how many calls come together depends on the number of workers."""
    generator = torch.Generator().manual_seed(calls)
    xs = [torch.randn(shape[:ndim], generator=generator) * (call + 1) + call for call in range(calls)]
    together = activations_seen(xs, chunk_elements=chunk)
    for x, seen in zip(xs, together, strict=True):
        alone = activation_seen(x)
        for a, b in ((seen.values, alone.values), (seen.samples, alone.samples), (seen.spread, alone.spread)):
            assert a.count == b.count
            assert np.array_equal(a.mean, b.mean)
            assert np.array_equal(a.m2, b.m2)
    assert calls == 1 or not np.array_equal(together[0].values.mean, together[1].values.mean)


def test_activation_moments_of_other_layouts() -> None:
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    assert_same(activation_seen(x).values, Moments.of(x.numpy()))
    assert_same(activation_seen(x.transpose(2, 3)[:, ::2]).values, Moments.of(x.numpy()[:, ::2]))


def test_per_instance_moments_are_those_that_instance_norm_tracks() -> None:
    x = torch.randn(6, 3, 8, 8) + torch.arange(6.0)[:, None, None, None]
    moments = activation_seen(x, per_instance=True).values
    norm = torch.nn.InstanceNorm2d(3, track_running_stats=True, momentum=1.0)
    norm(x)
    np.testing.assert_allclose(moments.mean, norm.running_mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.variance() * 64 / 63, norm.running_var.numpy(), rtol=1e-5)
    assert moments.variance().max() < activation_seen(x).values.variance().min()
