"""Batches: how items are read, what a pass says when it goes wrong."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bnctl.data.batches import Batch, as_batch, as_batches, class_labels, first_of, located, spread
from bnctl.errors import DataError

X = np.arange(24, dtype=np.float32).reshape(4, 1, 2, 3)
Y = np.array([0, 1, 2, 1])


@dataclass
class Graph:
    nodes: Any
    scale: float


class TestItems:
    @pytest.mark.parametrize("x", [X, torch.from_numpy(X)])
    def test_the_forms_of_the_contract(self, x):
        for item, args, kwargs, labelled in [
            (x, (x,), {}, False),
            ((x, Y), (x,), {}, True),
            ((x, torch.from_numpy(Y)), (x,), {}, True),
            ((x, Y[:, None]), (x,), {}, True),
            ((x, Y.astype(np.float64)), (x,), {}, True),
            ((x, None), (x,), {}, False),
            ((x,), (x,), {}, False),
            ([x], (x,), {}, False),
            ([x, Y], (x,), {}, True),
            ((x, x, Y), (x, x), {}, True),
            ((x, x, None), (x, x), {}, False),
            ({"image": x, "label": Y}, (), {"image": x}, True),
            (UserDict(image=x), (), {"image": x}, False),
            (namedtuple("Pair", "a b")(x, Y), (x,), {}, True),
        ]:
            batch = as_batch(item)
            assert len(batch.args) == len(args)
            assert all(a is b for a, b in zip(batch.args, args, strict=True))
            assert batch.kwargs.keys() == kwargs.keys()
            assert all(batch.kwargs[k] is kwargs[k] for k in kwargs)
            assert batch.size == 4
            if labelled:
                assert batch.labels.dtype == np.int64
                np.testing.assert_array_equal(batch.labels, Y)
            else:
                assert batch.labels is None

    @pytest.mark.parametrize("key", ["y", "label", "labels", "target", "targets"])
    def test_names_of_labels(self, key):
        batch = as_batch({"a": X, key: Y})
        assert list(batch.kwargs) == ["a"]
        np.testing.assert_array_equal(batch.labels, Y)

    def test_lists_of_images_are_one_input(self):
        images = [torch.zeros(3, 5, 7), torch.zeros(3, 4, 4)]
        for item in (images, (images,), (images, [{"boxes": torch.zeros(1, 4)}, {}]), (images, None)):
            batch = as_batch(item)
            assert batch.args == (images,)
            assert batch.labels is None
            assert batch.size == 2

    def test_other_objects_are_one_input(self):
        graph = Graph(X, 2.0)
        assert as_batch(graph).args == (graph,)
        assert as_batch(graph).size == 4

    @pytest.mark.parametrize("y", [np.zeros((4, 2, 3), int), np.array([0.5, 1, 2, 3]), [[1], [1, 2], [], []], "abcd"])
    def test_what_is_no_class_number_is_no_label(self, y):
        assert class_labels(y) is None
        assert as_batch((X, y)).labels is None

    @pytest.mark.parametrize("item", [None, "x", 3, 1.5, {}, (), {"y": Y}, {"a": X, "y": Y, "label": Y}, (X, Y[:3])])
    def test_what_is_no_batch_is_refused_by_its_number(self, item):
        passing = iter(as_batches([X, item], name="my loader"))
        next(passing)
        with pytest.raises(DataError, match="my loader, batch 1") as caught:
            next(passing)
        assert caught.value.hint

    def test_size_where_nothing_counts(self):
        assert Batch((np.float32(1),)).size == 1
        assert Batch().size == 1


class TestRows:
    @pytest.mark.parametrize("indices", [[0, 1, 2], [3, 1], [2, 2, 0, 1], []])
    def test_every_part_of_the_batch_is_chosen_from(self, indices):
        parts = (X, [1, 2, 3, 4], (1, 2, 3, 4), Graph(X, 2.0), np.arange(3), 5.0)
        batch = Batch(parts, {"d": {"x": torch.from_numpy(X)}}, Y, start=40)
        chosen = batch.rows(np.array(indices, dtype=np.int64))
        x, items, fixed, graph, other, number = chosen.args
        np.testing.assert_array_equal(x, X[indices])
        assert items == [[1, 2, 3, 4][i] for i in indices]
        assert fixed == tuple(items)
        np.testing.assert_array_equal(graph.nodes, X[indices])
        assert (graph.scale, number) == (2.0, 5.0)
        assert len(other) == 3  # another length than the batch's: not per sample
        np.testing.assert_array_equal(chosen.kwargs["d"]["x"], X[indices])
        np.testing.assert_array_equal(chosen.labels, Y[indices])
        assert (chosen.size, chosen.start) == (len(indices), 40)
        assert batch.size == 4


class TestShares:
    @given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 8), st.integers(1, 7))
    def test_a_share_is_every_step_th_batch_and_nothing_else_is_made(self, samples, batch_size, first, step):
        made = []

        def read(places):
            for place in places:
                made.append(place.start)
                yield Batch((np.arange(samples)[place],), start=place.start)

        batches = located(samples, batch_size, read)
        numbers = [index for index, _ in batches.every()]
        assert numbers == list(range(len(batches)))
        assert len(batches) == len(made) == -(-samples // batch_size)
        made.clear()
        share = list(batches.every(first, step))
        assert [index for index, _ in share] == numbers[first::step]
        assert made == [index * batch_size for index in numbers[first::step]]
        assert all(batch.args[0][0] == batch.start for _, batch in share)
        assert {batch.size for index, batch in share if index < len(batches) - 1} <= {batch_size}

    @given(st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any), st.integers(1, 4))
    def test_the_shares_of_a_loader_are_its_batches(self, sizes, step):
        bounds = np.cumsum([0, *sizes])
        batches = as_batches([np.arange(*pair) for pair in pairwise(bounds)])
        whole = [(i, b.start, b.args[0].tolist()) for i, b in enumerate(batches)]
        shares = [(i, b.start, b.args[0].tolist()) for first in range(step) for i, b in batches.every(first, step)]
        assert sorted(shares) == whole
        assert all(values[0] == start for _, start, values in whole)
        assert [i for i, _ in batches.every(0, step)] == [i for i, _, _ in whole][::step]

    def test_a_share_that_is_left_early_can_be_closed(self):
        closed = []

        def loader():
            try:
                while True:
                    yield X
            finally:
                closed.append(True)

        share = as_batches(loader()).every(1, 2)
        assert next(share)[0] == 1
        assert not closed
        share.close()
        assert closed


class TestPasses:
    def test_a_loader_can_be_read_again_and_knows_its_length(self):
        loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=3)
        batches = as_batches(loader)
        assert len(batches) == 2
        for _ in range(2):
            read = list(batches)
            assert [b.size for b in read] == [3, 1]
            np.testing.assert_array_equal(np.concatenate([b.args[0] for b in read]), X)
            np.testing.assert_array_equal(np.concatenate([b.labels for b in read]), Y)

    def test_no_length_where_there_is_none(self):
        class Endless(IterableDataset):
            def __iter__(self):
                return iter(torch.from_numpy(X))

        batches = as_batches(DataLoader(Endless(), batch_size=2))
        assert not hasattr(batches, "__len__")
        assert [b.size for b in batches] == [2, 2]

    def test_batches_stay_batches(self):
        batches = as_batches([X])
        assert as_batches(batches) is batches
        batch = Batch((X,), {"k": X}, Y)
        for read, start in zip(as_batches([batch, batch]), (0, 4), strict=True):
            assert read.args is batch.args
            assert read.kwargs is batch.kwargs
            assert read.labels is Y
            assert read.start == start

    def test_an_iterator_is_read_once_and_says_so(self):
        batches = as_batches(x for x in [X, X])
        assert len(list(batches)) == 2
        with pytest.raises(DataError, match=r"iterator \(generator\).*second pass"):
            list(batches)

    @pytest.mark.parametrize("source", [[], [np.zeros((0, 3))], iter(())])
    def test_no_samples(self, source):
        with pytest.raises(DataError, match="no samples"):
            list(as_batches(source))

    def test_batches_without_samples_are_skipped(self):
        assert [b.size for b in as_batches([X, X[:0], X[:1]])] == [4, 1]

    def test_a_loader_that_raises_is_named_with_the_batch(self):
        def loader():
            yield X
            raise KeyError("lost")

        passing = iter(as_batches(loader(), name="nets:loader"))
        next(passing)
        with pytest.raises(DataError, match="nets:loader fails at batch 1: KeyError: 'lost'") as caught:
            next(passing)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_errors_of_the_one_who_reads_are_not_the_loaders(self):
        with pytest.raises(ZeroDivisionError):
            for _ in as_batches([X]):
                raise ZeroDivisionError

    @pytest.mark.parametrize("source", [X, torch.from_numpy(X), {"x": X}, "folder", 3, None])
    def test_a_single_batch_is_not_data(self, source):
        with pytest.raises(DataError, match="not an iterable of batches") as caught:
            as_batches(source)
        assert "[batch]" in caught.value.hint

    def test_first_of(self):
        assert first_of(as_batches([X])).args[0] is X
        with pytest.raises(DataError, match="no batch"):
            first_of([])


class TestIndices:
    @given(st.integers(1, 300), st.none() | st.integers(1, 400))
    def test_spread_is_even_ascending_and_without_repetition(self, samples, limit):
        kept = spread(samples, limit)
        assert len(kept) == (samples if limit is None else min(samples, limit))
        gaps = np.diff(kept)
        assert kept[0] == 0 and kept[-1] < samples
        assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
