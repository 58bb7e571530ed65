"""Numpy archives as data."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnctl.data.npz import load_arrays, read_npz
from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError

RNG = np.random.default_rng(0)


def save(path, **arrays):
    file = path / "data.npz"
    np.savez(file, **arrays)
    return file


@given(samples=st.integers(1, 40), batch_size=st.integers(1, 50), compressed=st.booleans())
def test_the_batches_together_are_the_source(tmp_path_factory, samples, batch_size, compressed):
    x, y = RNG.standard_normal((samples, 2, 3)).astype(np.float32), RNG.integers(0, 9, samples).astype(np.uint8)
    file = tmp_path_factory.mktemp("npz") / "d.npz"
    (np.savez_compressed if compressed else np.savez)(file, x=x, y=y)
    batches = read_npz(file, batch_size=batch_size)
    for _ in range(2):
        read = list(batches)
        assert len(read) == len(batches)
        assert {b.size for b in read[:-1]} <= {batch_size}
        np.testing.assert_array_equal(np.concatenate([b.args[0] for b in read]), x)
        labels = np.concatenate([b.labels for b in read])
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, y)


@given(samples=st.integers(1, 40), limit=st.integers(1, 50), batch_size=st.integers(1, 9))
def test_a_limit_spreads_over_the_file(tmp_path_factory, samples, limit, batch_size):
    x = np.arange(samples, dtype=np.float32)
    file = save(tmp_path_factory.mktemp("npz"), x=x, y=np.arange(samples))
    read = list(read_npz(file, batch_size=batch_size, limit=limit))
    kept = np.concatenate([b.args[0] for b in read])
    assert len(kept) == min(samples, limit)
    np.testing.assert_array_equal(kept, np.concatenate([b.labels for b in read]))
    assert max(np.diff(np.append(kept, samples)), default=0) <= -(-samples // len(kept))


def test_keyword_inputs_by_name(tmp_path):
    file = save(tmp_path, tokens=np.ones((5, 7), np.int64), mask=np.ones((5, 7), bool), labels=np.arange(5))
    first = next(iter(read_npz(file, batch_size=2)))
    assert first.args == ()
    assert {name: (a.shape, a.dtype) for name, a in first.kwargs.items()} == {
        "tokens": ((2, 7), np.int64),
        "mask": ((2, 7), np.bool_),
    }
    np.testing.assert_array_equal(first.labels, [0, 1])


def test_without_labels(tmp_path):
    assert next(iter(read_npz(save(tmp_path, x=np.zeros((3, 2)))))).labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.arange(3)}, "no input"),
        ({}, "no input"),
        ({"x": np.zeros((4, 2)), "y": np.arange(3)}, "x has 4, y has 3"),
        ({"a": np.zeros((4, 2)), "b": np.zeros((5, 2))}, "a has 4, b has 5"),
        ({"x": np.zeros((2, 2)), "y": np.array([0.5, 1])}, "no class numbers"),
        ({"x": np.zeros((2, 2)), "y": np.array(["a", "b"])}, "no class numbers"),
        ({"x": np.zeros((2, 2)), "y": np.arange(2), "label": np.arange(2)}, "y and label"),
        ({"x": np.zeros((0, 2))}, "no samples"),
        ({"x": np.float32(1)}, "no samples"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8)}, "uint8 images"),
        ({"x": np.zeros((2, 8, 8), np.uint8)}, "uint8 images"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message) as caught:
        read_npz(save(tmp_path, **arrays))
    assert "data.npz" in caught.value.message
    assert caught.value.hint


def test_objects_are_not_unpickled(tmp_path):
    class Planted:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    file = tmp_path / "data.npz"
    np.savez(file, x=np.array([Planted()], dtype=object))
    with pytest.raises(DataError, match=r"data\.npz cannot be read"):
        read_npz(file)


def test_damaged_files(tmp_path):
    whole = io.BytesIO()
    np.savez_compressed(whole, x=RNG.standard_normal((50, 50)))
    content = whole.getvalue()
    broken = bytearray(content)
    broken[400:900] = bytes(500)
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for damaged in (b"", b"no archive", content[: len(content) // 2], bytes(broken), single.getvalue()):
        file = tmp_path / "data.npz"
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data\.npz"):
            read_npz(file)


class TestMaps:
    @given(
        shape=st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple),
        dtype=st.sampled_from(["f4", ">f8", "u1", "?", "c16", "U3", "datetime64[s]"]),
        order=st.sampled_from("CF"),
        name=st.sampled_from(["x", "a_longer_name", "größe", "folder/x"]),
    )
    def test_stored_arrays_are_mapped_and_equal(self, tmp_path_factory, shape, dtype, order, name):
        path = tmp_path_factory.mktemp("npz") / "d.npz"
        want = np.asarray(RNG.integers(0, 2, shape).astype(dtype), order=order)
        np.savez(path, **{"first": np.arange(3), name: want})
        got = load_arrays(path)[name]
        assert isinstance(got, np.memmap)
        assert not got.flags.writeable
        assert got.dtype == want.dtype
        assert got.flags.f_contiguous == want.flags.f_contiguous
        np.testing.assert_array_equal(got, want)

    def test_what_cannot_be_mapped_is_read(self, tmp_path):
        np.savez_compressed(tmp_path / "small.npz", x=np.arange(5))
        np.savez(tmp_path / "empty.npz", x=np.zeros((0, 3)))
        with pytest.warns(UserWarning, match=r"format 3\.0"):
            np.savez(tmp_path / "fields.npz", x=np.zeros(2, dtype=[("Größe Ω", "f4")]))
        for name in ("small", "empty", "fields"):
            with np.load(tmp_path / f"{name}.npz") as archive:
                want = archive["x"]
            got = load_arrays(tmp_path / f"{name}.npz")["x"]
            assert not isinstance(got, np.memmap)
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)

    def test_batches_are_copies_that_may_be_written(self, tmp_path):
        file = save(tmp_path, x=np.arange(6.0), y=np.arange(6))
        first, second = (next(iter(read_npz(file, batch_size=3))).args[0] for _ in range(2))
        assert type(first) is np.ndarray
        assert first.flags.aligned
        first[:] = -1
        np.testing.assert_array_equal(second, np.arange(3.0))

    @pytest.mark.parametrize(("save_as", "flat"), [(np.savez, True), (np.savez_compressed, False)])
    def test_memory_stays_flat(self, tmp_path, save_as, flat):
        """The negative control is the compressed file, which is held in memory."""
        x = np.zeros((4000, 1000), np.float32)
        save_as(tmp_path / "d.npz", x=x)
        tracemalloc.start()
        for _ in read_npz(tmp_path / "d.npz", batch_size=10):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (peak < x.nbytes / 4) == flat

    def test_any_damage_to_a_stored_array_is_found(self, tmp_path):
        path = save(tmp_path, x=np.arange(300_000, dtype=np.float64))
        content = path.read_bytes()
        start = content.index(b"\x93NUMPY")
        for place in (start + 3, start + 130, start + 1_500_000):
            broken = bytearray(content)
            broken[place] ^= 1
            path.write_bytes(broken)
            with pytest.raises(DataError, match=r"data\.npz cannot be read"):
                read_npz(path)

    def test_a_header_that_says_more_than_there_is(self, tmp_path):
        path = tmp_path / "data.npz"
        array = io.BytesIO()
        np.save(array, np.zeros(10))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", array.getvalue().replace(b"(10,)", b"(99,)"))
        with pytest.raises(DataError, match=r"data\.npz cannot be read"):
            read_npz(path)


class TestImages:
    def test_pixels_become_input(self, tmp_path):
        images = RNG.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
        batches = read_npz(save(tmp_path, x=images), batch_size=2, preprocess=Preprocess(mean=mean, std=std))
        got = np.concatenate([b.args[0] for b in batches])
        assert got.dtype == np.float32
        want = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def test_networks_that_take_pixels(self, tmp_path):
        images = RNG.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
        (batch,) = read_npz(save(tmp_path, x=images), preprocess=Preprocess(dtype="uint8", layout="NHWC"))
        np.testing.assert_array_equal(batch.args[0], images)
        assert batch.args[0].dtype == np.uint8

    def test_grey_images_with_and_without_a_channel_axis(self, tmp_path):
        images = RNG.integers(0, 256, (3, 4, 4), dtype=np.uint8)
        for x in (images, images[..., None]):
            (batch,) = read_npz(save(tmp_path, x=x), preprocess=Preprocess(channels="L"))
            np.testing.assert_allclose(batch.args[0], images[:, None] / 255, rtol=1e-6)

    def test_preprocess_without_images_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"no images to preprocess: x is float32 \(2, 3\)"):
            read_npz(save(tmp_path, x=np.zeros((2, 3), np.float32)), preprocess=Preprocess())

    def test_an_image_too_small_is_named(self, tmp_path):
        file = save(tmp_path, x=np.zeros((9, 4, 4, 3), np.uint8))
        with pytest.raises(DataError, match="image 0 is 4x4, smaller than the crop of 8x8"):
            list(read_npz(file, preprocess=Preprocess(crop=8)))
