"""Synthetic data and `--input`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnctl.data.synthetic import DTYPES, InputSpec, parse_input, random_batch, random_batches
from bnctl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x224x224", InputSpec((1, 3, 224, 224))),
        ("7", InputSpec((7,))),
        ("name:1x3x32x32:float32", InputSpec((1, 3, 32, 32), "name")),
        ("1x8:int64", InputSpec((1, 8), None, "int64")),
        ("tokens:2x8", InputSpec((2, 8), "tokens")),
        ("input:0:1x3:float16", InputSpec((1, 3), "input:0", "float16")),
        (" 1x3 ", InputSpec((1, 3))),
        ("flag::bool", InputSpec((), "flag", "bool")),
        (":int64", InputSpec((), None, "int64")),
    ],
)
def test_parse(text, spec):
    assert parse_input(text) == spec


names = st.none() | st.text("abc.:_/", min_size=1, max_size=8)


@given(st.lists(st.integers(1, 99), max_size=5), names, st.sampled_from(DTYPES))
def test_what_is_written_is_read(shape, name, dtype):
    spec = InputSpec(tuple(shape), name, dtype)
    assert parse_input(str(spec)) == spec


@pytest.mark.parametrize(
    "text", ["", "abc", "1x", "x3", "1x0x3", "-1x3", "1x3:float33", "a:b", ":1x3", "1,3,224", "1x3:int64:a"]
)
def test_what_is_no_input_has_an_example(text):
    with pytest.raises(UsageError) as caught:
        parse_input(text)
    assert "float32" in caught.value.hint or "1x3x224x224" in caught.value.hint


def test_scalars_alone_hold_no_samples():
    with pytest.raises(UsageError, match="no input has an axis of samples"):
        random_batches(5, [InputSpec(())], batch_size=2)


def test_a_scalar_is_the_same_in_every_batch():
    specs = (InputSpec((), "scale"), InputSpec((1, 3), "x"), InputSpec((), "flag", "bool"))
    for size, batch in zip((2, 1), random_batches(3, specs, batch_size=2), strict=True):
        assert batch.size == size
        assert batch.kwargs["x"].shape == (size, 3)
        assert batch.kwargs["scale"].shape == batch.kwargs["flag"].shape == ()
        assert batch.kwargs["flag"].dtype == bool
    assert random_batch(specs).kwargs["scale"] == batch.kwargs["scale"]


@given(
    samples=st.integers(1, 30),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_the_samples_do_not_depend_on_the_batch_size(samples, sizes, seed, dtype):
    specs = (InputSpec((1, 3), None, dtype), InputSpec((1, 2, 2), "other", "float32"), InputSpec((5,), "fixed"))
    read = [list(random_batches(samples, specs, batch_size=size, seed=seed)) for size in sizes]
    together = [[np.concatenate([b.args[0] for b in r]), np.concatenate([b.kwargs["other"] for b in r])] for r in read]
    for a, b in zip(*together, strict=True):
        assert len(a) == samples
        np.testing.assert_array_equal(a, b)
    fixed = [b.kwargs["fixed"] for r in read for b in r]
    assert all(np.array_equal(f, fixed[0]) for f in fixed)
    assert fixed[0].shape == (5,)


def test_passes_and_seeds():
    spec = (InputSpec((1, 4)),)
    batches = random_batches(5, spec, batch_size=2)
    assert len(batches) == len(list(batches)) == 3
    one, two = ([b.args[0] for b in batches] for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    other = next(iter(random_batches(5, spec, batch_size=2, seed=1))).args[0]
    assert not np.array_equal(other, one[0])


def test_a_share_is_part_of_the_whole():
    specs = (InputSpec((1, 4)), InputSpec((2,), "fixed"))
    batches = random_batches(11, specs, batch_size=2)
    whole = list(batches)
    assert len(np.unique(np.concatenate([b.args[0] for b in whole]), axis=0)) == 11
    share = list(batches.every(1, 3))
    assert [index for index, _ in share] == [1, 4]
    for index, batch in share:
        assert batch.start == 2 * index
        np.testing.assert_array_equal(batch.args[0], whole[index].args[0])
        np.testing.assert_array_equal(batch.kwargs["fixed"], whole[0].kwargs["fixed"])


def test_inputs_are_independent_of_each_other():
    batch = random_batch((InputSpec((100,)), InputSpec((100,))))
    assert not np.array_equal(*batch.args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_each_type(dtype):
    (values,) = random_batch((InputSpec((5000,), None, dtype),)).args
    assert values.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    wide = values.astype(np.float64)
    if "float" in dtype:
        assert abs(wide.mean()) < 0.1
        assert abs(wide.std() - 1) < 0.1
    else:
        assert set(np.unique(wide)) == (set(range(256)) if dtype == "uint8" else {0, 1})


def test_scalars_of_a_signature():
    assert random_batch((InputSpec((1, 2), "x"), InputSpec((), "s"))).kwargs["s"].shape == ()


def test_refusals():
    with pytest.raises(UsageError, match="need the shapes") as caught:
        random_batches(4, ())
    assert "--input" in caught.value.hint
    with pytest.raises(UsageError, match="one name"):
        random_batch((InputSpec((1,), "a"), InputSpec((2,), "a")))
    with pytest.raises(UsageError, match="no samples"):
        random_batches(0, (InputSpec((1,)),))
