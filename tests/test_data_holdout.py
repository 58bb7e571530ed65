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


HELD = {one_in: {i for b in hold_out(counted(1000, 1000), one_in)[1] for i in b.args[0]} for one_in in range(2, 10)}


def test_one_of_so_many_in_a_row_is_held_out_at_random_places():
    for one_in, held in HELD.items():
        rows = [i // one_in for i in sorted(held)]
        assert rows[: 1000 // one_in] == list(range(1000 // one_in))
        places = np.bincount([i % one_in for i in held], minlength=one_in) * one_in / len(held)
        assert (places > 0.4).all() and (places < 1.7).all()


def test_data_in_turns_are_judged_by_all_their_classes():
    """Labels 0, 1, 2, 3, 4, 0, ...: every fifth sample would be of one class."""
    held = np.bincount([i % 5 for i in HELD[5]], minlength=5)
    assert held.min() > 20
    assert len({i % 5 for i in range(4, 1000, 5)}) == 1  # what was done before


@given(st.integers(1, 60), st.integers(1, 13), st.integers(2, 9), st.sampled_from([counted, listed]))
def test_which_samples_are_held_out_depends_on_their_numbers_only(samples, batch_size, one_in, source):
    want = [[i for i in range(samples) if (i in HELD[one_in]) == held] for held in (False, True)]
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
    values = [i for b in rest for i in b.args[0]]
    _, held = hold_out(rest, 5)
    assert [i for b in held for i in b.args[0]] == [value for i, value in enumerate(values) if i in HELD[5]]


def test_fewer_samples_than_one_in():
    first = min(HELD[9])
    rest, held = hold_out(counted(first, 2), 9)
    assert sum(b.size for b in rest) == first
    assert list(held) == []


@pytest.mark.parametrize("one_in", [1, 0, -3])
def test_all_or_nothing_is_refused(one_in):
    with pytest.raises(UsageError, match=f"one sample in {one_in}") as caught:
        hold_out(counted(3, 2), one_in)
    assert "2 or more" in caught.value.hint
