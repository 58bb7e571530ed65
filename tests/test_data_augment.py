"""Transforms of training, applied to data."""

from __future__ import annotations

import itertools
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnctl.data.augment import augmented, load_transform
from bnctl.data.batches import Batch, as_batches, located
from bnctl.data.holdout import hold_out
from bnctl.errors import DataError

X = np.random.default_rng(0).standard_normal((13, 3, 4, 4)).astype(np.float32)
names = itertools.count()


def source(batch_size):
    def read(places):
        return (Batch((X[place],), {}, np.arange(13)[place], place.start) for place in places)

    return located(13, batch_size, read)


def noisy(sample):
    """Draws from all three generators."""
    assert isinstance(sample, torch.Tensor)
    assert sample.shape == (3, 4, 4)
    return sample + torch.rand(1) + float(np.random.random()) + random.random()


def joined(batches):
    return np.concatenate([b.args[0] for b in batches])


@settings(deadline=None)
@given(st.integers(1, 14), st.integers(1, 4))
def test_every_batch_size_pass_and_share_gives_the_same(batch_size, step):
    want = joined(augmented(source(4), noisy, seed=3))
    assert len(np.unique((want - X).mean(axis=(1, 2, 3)).round(4))) == 13  # each sample draws its own
    batches = augmented(source(batch_size), noisy, seed=3)
    assert len(batches) == len(source(batch_size))
    for _ in range(2):
        read = list(batches)
        np.testing.assert_array_equal(joined(read), want)
        np.testing.assert_array_equal(np.concatenate([b.labels for b in read]), np.arange(13))
        assert read[0].args[0].dtype == np.float32
    shares = sorted((pair for first in range(step) for pair in batches.every(first, step)), key=lambda pair: pair[0])
    np.testing.assert_array_equal(joined(b for _, b in shares), want)


def test_what_each_generator_draws_comes_from_seed_and_sample():
    """Without the seeding the passes differ: this is what makes the test above one that can fail."""
    for draw in (lambda: torch.rand(1).item(), np.random.random, random.random):
        shifted = [joined(augmented(source(5), lambda x, draw=draw: x + draw(), seed=seed)) - X for seed in (0, 0, 1)]
        np.testing.assert_array_equal(shifted[0], shifted[1])
        assert np.abs(shifted[0] - shifted[2]).max() > 0.01
        assert draw() != draw()
    unseeded = np.random.default_rng(0)
    passes = [joined(augmented(source(5), lambda x: x + unseeded.random(), seed=0)) for _ in range(2)]
    assert np.abs(passes[0] - passes[1]).max() > 0.01


def test_held_out_samples_do_not_depend_on_the_batch_size():
    read = [joined(augmented(hold_out(source(size), 3)[0], noisy, seed=1)) for size in (2, 5)]
    np.testing.assert_array_equal(*read)


@pytest.mark.parametrize("fails", [False, True])
def test_the_generators_are_put_back(fails):
    def call(sample):
        if fails:
            raise RuntimeError("no")
        return noisy(sample)

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    try:
        for _ in augmented(source(4), call, seed=0):
            now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
            assert now == before
    except DataError:
        assert fails
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_the_data_are_left_alone_by_a_transform_in_place():
    for x in (X.copy(), torch.tensor(X), [image.copy() for image in X]):
        (batch,) = augmented(as_batches([(x, None)]), lambda sample: sample.zero_(), seed=0)
        assert type(batch.args[0]) is type(x)
        assert not any(np.any(np.asarray(part)) for part in batch.args[0])
        np.testing.assert_array_equal(np.stack([np.asarray(part) for part in x]), X)


def test_forms():
    for call in (lambda s: s.flip(-1), lambda s: s.numpy()[..., ::-1]):
        (batch,) = augmented(as_batches([{"image": X, "other": X, "y": np.arange(13)}]), call, seed=0)
        np.testing.assert_array_equal(batch.kwargs["image"], X[..., ::-1])
        assert batch.kwargs["other"] is X
    half = torch.tensor(X).bfloat16()
    (batch,) = augmented(as_batches([(half, X, None)]), lambda s: s.flip(-1), seed=0)
    assert torch.equal(batch.args[0], half.flip(-1))
    assert batch.args[1] is X
    images = [torch.zeros(3, 2, 2), torch.zeros(3, 5, 4)]
    (batch,) = augmented(as_batches([images]), lambda s: s + 1, seed=0)
    assert [image.shape for image in batch.args[0]] == [image.shape for image in images]
    (batch,) = augmented(as_batches([X.astype(np.float64)[:, 0, 0, 0]]), lambda s: s * 2, seed=0)
    np.testing.assert_array_equal(batch.args[0], X.astype(np.float64)[:, 0, 0, 0] * 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: 1 // 0, "mine:t fails on sample 0: ZeroDivisionError"),
        (lambda s: [s], "mine:t fails on sample 0: TypeError: it returned a list"),
        (lambda s: None, "it returned a NoneType"),
        (
            lambda s: s[:, : 1 + int(s[0, 0, 0] == X[6, 0, 0, 0])],
            r"mine:t makes float32 \(3, 1, 4\) of sample 0 and .* of sample 6",
        ),
    ],
)
def test_failures_name_the_transform_and_the_sample(call, message):
    with pytest.raises(DataError, match=message) as caught:
        list(augmented(source(20), call, seed=0, name="mine:t"))
    assert caught.value.hint


def test_the_number_of_the_sample_is_that_in_the_data():
    def call(sample):
        if torch.equal(sample, torch.tensor(X[9])):
            raise ValueError("this one")
        return sample

    with pytest.raises(DataError, match="the transform fails on sample 9: ValueError: this one") as caught:
        list(augmented(source(4), call, seed=0))
    assert "float32 (3, 4, 4)" in caught.value.hint


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"transforms_for_tests_{next(names)}"
    code = f"value = 3\ndef double(x):\n    from {name}_late import FACTOR\n    return x * FACTOR\n"
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / f"{name}_late.py").write_text("FACTOR = 2")
    monkeypatch.chdir(tmp_path)
    yield name
    for imported in (name, f"{name}_late"):
        sys.modules.pop(imported, None)


def test_a_transform_of_the_current_folder(module):
    before = list(sys.path)
    call = load_transform(f"{module}:double")
    np.testing.assert_array_equal(joined(augmented(source(4), call, seed=0)), X * 2)
    assert sys.path == before


def test_words_that_name_no_transform(module):
    for word, message in [
        ("flip", "flip: no transform is named so"),
        (f"{module}:doubel", "has no doubel"),
        (f"{module}:value", "is a int, not callable"),
        (f"{module}_none:f", f"no module named {module}_none"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load_transform(word)
        assert caught.value.hint
