"""From images to what a network takes: the file, and the steps."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bnctl.data.preprocess import Preprocess, are_images, load_preprocess, parse_preprocess
from bnctl.errors import DataError
from bnctl.models.importing import import_module

RNG = np.random.default_rng(0)


def picture(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8))


def apply(preprocess, *images):
    names = [f"{i}.png" for i in range(len(images))]
    return preprocess.batch([preprocess.pixels(image, name) for image, name in zip(images, names, strict=True)], names)


class TestSteps:
    def test_the_default_is_to_tensor(self):
        image = picture(5, 6)
        got = apply(Preprocess(), image)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_allclose(got[0], np.asarray(image).transpose(2, 0, 1) / 255, rtol=1e-6)

    def test_as_torchvision_does_it(self):
        if find_spec("torchvision") is None:
            pytest.skip("torchvision is not installed")
        import_module("torchvision")
        transforms = import_module("torchvision.transforms")
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        for (height, width), resize, crop in [
            ((37, 53), 20, 15),
            ((53, 37), 21, 16),
            ((30, 30), 30, 30),
            ((41, 33), [25, 30], 17),
        ]:
            image = picture(height, width)
            steps = [transforms.Resize(resize), transforms.CenterCrop(crop), transforms.ToTensor()]
            want = transforms.Compose([*steps, transforms.Normalize(mean, std)])(image)
            size = tuple(resize) if isinstance(resize, list) else resize
            got = apply(Preprocess(resize=size, crop=crop, mean=mean, std=std), image)
            np.testing.assert_allclose(got[0], want.numpy(), rtol=1e-5, atol=1e-5)

    def test_a_wrong_order_of_channels_shows(self):
        image = picture(4, 4)
        rgb, bgr = apply(Preprocess(), image), apply(Preprocess(channels="BGR"), image)
        np.testing.assert_array_equal(bgr, rgb[:, ::-1])
        assert not np.allclose(bgr, rgb)

    def test_mean_is_in_the_order_of_the_result(self):
        image = picture(4, 4)
        got = apply(Preprocess(channels="BGR", mean=(0.1, 0.2, 0.3)), image)
        np.testing.assert_allclose(got[0, 0], np.asarray(image)[..., 2] / 255 - 0.1, rtol=1e-5, atol=1e-6)

    def test_grey_layout_scale_and_pixels(self):
        assert apply(Preprocess(channels="L"), picture(4, 6)).shape == (1, 1, 4, 6)
        assert apply(Preprocess(layout="NHWC"), picture(4, 6)).shape == (1, 4, 6, 3)
        assert apply(Preprocess(scale=1.0), Image.new("RGB", (2, 2), "white")).max() == 255
        pixels = apply(Preprocess(dtype="uint8"), picture(4, 6))
        assert (pixels.shape, pixels.dtype) == ((1, 3, 4, 6), np.uint8)

    @pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
    def test_other_modes_are_converted(self, mode):
        assert apply(Preprocess(), picture(4, 4).convert(mode)).shape == (1, 3, 4, 4)

    @pytest.mark.parametrize("mode", ["I", "I;16", "F"])
    def test_more_than_eight_bits_are_refused(self, mode):
        with pytest.raises(DataError, match=r"0\.png has more than 8 bits"):
            apply(Preprocess(), Image.new(mode, (4, 4)))

    def test_one_batch_one_size(self):
        with pytest.raises(DataError, match=r"1\.png is 5x4 where 0\.png is 4x4") as caught:
            apply(Preprocess(), picture(4, 4), picture(5, 4))
        assert "resize" in caught.value.hint
        assert apply(Preprocess(resize=4, crop=4), picture(4, 4), picture(5, 4)).shape == (2, 3, 4, 4)

    def test_a_crop_beyond_the_image(self):
        with pytest.raises(DataError, match=r"0\.png is 4x4, smaller than the crop of 3x5"):
            apply(Preprocess(crop=(3, 5)), picture(4, 4))

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
    def test_the_shorter_side_is_what_resize_says(self, height, width, side):
        got = apply(Preprocess(resize=side), Image.new("RGB", (width, height)))
        assert min(got.shape[2:]) == side

    def test_what_counts_as_images(self):
        for shape in [(2, 8, 8), (2, 8, 8, 1), (2, 8, 8, 3), (2, 8, 8, 4)]:
            assert are_images(np.zeros(shape, np.uint8))
        for shape, dtype in [((2, 8), np.uint8), ((2, 3, 8, 8), np.uint8), ((2, 8, 8, 3), np.float32)]:
            assert not are_images(np.zeros(shape, dtype))


class TestFile:
    def test_every_key(self, tmp_path):
        content = {
            "resize": [32, 40],
            "crop": 28,
            "interpolation": "bicubic",
            "channels": "BGR",
            "scale": 1,
            "mean": [104, 117, 123],
            "std": 1,
            "layout": "NHWC",
            "dtype": "float32",
        }
        file = tmp_path / "p.json"
        file.write_text(json.dumps(content))
        assert load_preprocess(file) == Preprocess(
            resize=(32, 40), crop=28, interpolation="bicubic", channels="BGR", scale=1.0,
            mean=(104.0, 117.0, 123.0), std=1.0, layout="NHWC",
        )  # fmt: skip
        assert parse_preprocess({}, "p") == Preprocess()

    @pytest.mark.parametrize(
        ("key", "near"),
        [("means", "mean"), ("resise", "resize"), ("channel_order", "channels"), ("zzz", "the keys are")],
    )
    def test_unknown_keys_have_near_matches(self, key, near):
        with pytest.raises(DataError, match=f"p.json: unknown key '{key}'") as caught:
            parse_preprocess({key: 1}, "p.json")
        assert near in caught.value.hint

    @pytest.mark.parametrize(
        "content",
        [
            {"resize": 0}, {"resize": 2.5}, {"resize": True}, {"resize": [1]}, {"resize": "big"}, {"crop": -1}, {"mean": "0.5"},
            {"mean": [0.5, 0.5]}, {"std": 0}, {"std": [1, 0, 1]}, {"std": [1, None, 1]}, {"scale": 0}, {"scale": float("nan")},
            {"channels": "rgb"}, {"channels": ["RGB"]}, {"layout": "CHW"}, {"interpolation": "area"}, {"dtype": "int8"},
            {"dtype": "uint8", "mean": 0.5}, {"channels": "L", "mean": [1, 2, 3]},
        ],
    )  # fmt: skip
    def test_values_of_another_kind(self, content):
        with pytest.raises(DataError, match=r"^p\.json: ") as caught:
            parse_preprocess(content, "p.json")
        assert caught.value.hint

    @pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
    def test_files_that_are_no_object(self, tmp_path, text):
        file = tmp_path / "p.json"
        file.write_text(text)
        with pytest.raises(DataError, match=r"p\.json"):
            load_preprocess(file)
        with pytest.raises(DataError, match=r"none\.json cannot be read"):
            load_preprocess(tmp_path / "none.json")
