"""Samples that are held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnctl.data.batches import Batch, as_batches, located
from bnctl.data.holdout import hold_out
from bnctl.errors import UsageError


def counted(samples, batch_size):
    """Data whose samples and labels are their own numbers."""
    numbers = np.arange(samples)

    def read(places):
        return (Batch((numbers[place],), {}, numbers[place], place.start) for place in places)

    return located(samples, batch_size, read)


def listed(samples, batch_size):
    numbers = np.arange(samples)
    return as_batches([(numbers[i : i + batch_size],) * 2 for i in range(0, samples, batch_size)])


@given(st.integers(1, 60), st.integers(1, 13), st.integers(2, 9), st.sampled_from([counted, listed]))
def test_which_samples_are_held_out_depends_on_their_numbers_only(samples, batch_size, one_in, source):
    want = [i for i in range(samples) if i % one_in != one_in - 1], list(range(one_in - 1, samples, one_in))
    parts = hold_out(source(samples, batch_size), one_in)
    for part, numbers in zip(parts, want, strict=True):
        for _ in range(2):
            read = list(part)
            assert [i for b in read for i in b.args[0]] == numbers
            assert [i for b in read for i in b.labels] == numbers
            assert all(b.size for b in read)
            assert [b.start for b in read] == np.cumsum([0, *(b.size for b in read)])[:-1].tolist()


@given(st.integers(1, 60), st.integers(1, 13), st.integers(2, 9), st.integers(1, 4))
def test_shares_of_a_part_are_the_part_and_batches_keep_their_numbers(samples, batch_size, one_in, step):
    for part in hold_out(counted(samples, batch_size), one_in):
        whole = [(index, b.start, b.args[0].tolist()) for index, b in part.every()]
        shares = [(i, b.start, b.args[0].tolist()) for first in range(step) for i, b in part.every(first, step)]
        assert sorted(shares) == whole
        assert all(values[0] // batch_size == index for index, _, values in whole)


def test_a_part_of_a_part():
    rest, _ = hold_out(counted(20, 3), 2)
    _, held = hold_out(rest, 5)
    assert [i for b in held for i in b.args[0]] == [8, 18]


def test_fewer_samples_than_one_in():
    rest, held = hold_out(counted(3, 2), 4)
    assert [b.size for b in rest] == [2, 1]
    assert list(held) == []


@pytest.mark.parametrize("one_in", [1, 0, -3])
def test_all_or_nothing_is_refused(one_in):
    with pytest.raises(UsageError, match=f"one sample in {one_in}") as caught:
        hold_out(counted(3, 2), one_in)
    assert "2 or more" in caught.value.hint
