"""Image folders as data."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bnctl.data.folder import read_folder
from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError

COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "eel": (0, 0, 255)}
COUNTS = {"cat": 5, "dog": 3, "eel": 4}


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(COUNTS[name]):
            # The red, green or blue value tells images of a class apart.
            place = tmp_path / name / ("more" if i == 0 else "")
            Image.new("RGB", (4, 6), tuple(c and c - i for c in colour)).save(place / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "dog" / ".hidden.png").write_text("not an image")
    return tmp_path


def pixels(batches):
    return np.concatenate([b.args[0] for b in batches])


def test_labels_are_positions_of_sorted_names(folder):
    batches = read_folder(folder, batch_size=5)
    read = list(batches)
    assert [b.size for b in read] == [5, 5, 2]
    assert len(batches) == 3
    labels = np.concatenate([b.labels for b in read])
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(labels), list(COUNTS.values()))
    images = pixels(read)
    assert images.shape == (12, 3, 6, 4)
    np.testing.assert_array_equal(images.max(axis=(2, 3)).argmax(axis=1), labels)  # the colour tells the class


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12, 100])
def test_the_batches_together_are_the_folder_in_one_order(folder, batch_size):
    want = pixels(read_folder(folder, batch_size=7))
    assert len(np.unique(want.reshape(12, -1), axis=0)) == 12
    batches = read_folder(folder, batch_size=batch_size)
    for _ in range(2):
        np.testing.assert_array_equal(pixels(batches), want)


def test_a_share_decodes_no_image_of_another(folder):
    whole = list(read_folder(folder, batch_size=2).every())
    assert [index for index, _ in whole] == list(range(6))
    assert [batch.start for _, batch in whole] == [0, 2, 4, 6, 8, 10]
    share = list(read_folder(folder, batch_size=2).every(1, 3))
    assert [index for index, _ in share] == [1, 4]
    for index, batch in share:
        np.testing.assert_array_equal(batch.args[0], whole[index][1].args[0])
    # All images are broken now but those of the first batch of the share.
    seen = {(label, image.tobytes()) for label, image in zip(share[0][1].labels, share[0][1].args[0], strict=True)}
    for label, name in enumerate(sorted(COUNTS)):
        for path in (folder / name).rglob("[0-9].png"):
            with Image.open(path) as image:
                content = (np.asarray(image, np.float32) / 255).transpose(2, 0, 1)
            if (label, np.ascontiguousarray(content).tobytes()) not in seen:
                path.write_bytes(b"broken")
    (_, batch), *_ = read_folder(folder, batch_size=2).every(1, 6)
    np.testing.assert_array_equal(batch.args[0], share[0][1].args[0])
    with pytest.raises(DataError, match="not an image"):
        next(read_folder(folder, batch_size=2).every(0, 3))


def test_the_order_mixes_classes_and_follows_the_seed(folder):
    labels = [np.concatenate([b.labels for b in read_folder(folder, seed=seed)]).tolist() for seed in (0, 0, 1)]
    assert labels[0] == labels[1]
    assert sorted(labels[0]) != labels[0]
    assert labels[2] != labels[0]


def test_a_limit_takes_from_every_class(folder):
    labels = np.concatenate([b.labels for b in read_folder(folder, limit=4)])
    assert len(labels) == 4
    assert set(labels) == {0, 1, 2}


def test_preprocess(folder):
    batch = next(iter(read_folder(folder, preprocess=Preprocess(resize=8, crop=8, layout="NHWC"))))
    assert batch.args[0].shape == (12, 8, 8, 3)


def test_images_without_classes(folder):
    (batch,) = read_folder(folder / "cat" / "more")
    assert batch.labels is None
    assert batch.size == 1


def test_an_image_that_cannot_be_read_is_named(folder):
    whole = (folder / "dog" / "1.png").read_bytes()
    for broken in (b"", b"text", whole[:40]):
        (folder / "dog" / "1.png").write_bytes(broken)
        with pytest.raises(DataError, match=r"dog/1\.png is not an image") as caught:
            list(read_folder(folder))
        assert caught.value.__cause__ is not None


def test_a_class_without_images_is_named(folder):
    (folder / "ape").mkdir()
    with pytest.raises(DataError, match="no images in ape"):
        read_folder(folder)


def test_images_beside_classes(folder):
    Image.new("RGB", (2, 2)).save(folder / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png"):
        read_folder(folder)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        read_folder(tmp_path)
