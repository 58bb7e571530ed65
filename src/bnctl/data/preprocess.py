"""From images to what a network takes: `--preprocess file.json`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Channels = Literal["RGB", "BGR", "L"]
Layout = Literal["NCHW", "NHWC"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
PixelType = Literal["float32", "uint8"]

EXAMPLE = '{"resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'


@dataclass(frozen=True)
class Preprocess:
    """Steps from 8-bit images to the input of a network, in this order; the fields are the keys of the file.

    x = (scale * pixel - mean) / std

    The defaults do what torchvision's `ToTensor` does, and resize and crop what its `Resize` and `CenterCrop` do. Orientation
    in EXIF data is not looked at; 16-bit images are refused.

    Attributes:
        resize: an integer is the new length of the shorter side, [height, width] is the new size.
        crop: side, or [height, width], of what is cut from the middle.
        interpolation: of `resize`.
        channels: "RGB", "BGR", or "L" for one channel of grey.
        scale: factor on pixel values 0 to 255.
        mean: in units after scaling; a number, or one per channel in the order of the result.
        std: likewise; not zero.
        layout: "NCHW" or "NHWC".
        dtype: "float32", or "uint8" for networks that take pixels: no scale, mean and std then.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    channels: Channels = "RGB"
    scale: float = 1 / 255
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    layout: Layout = "NCHW"
    dtype: PixelType = "float32"

    def __post_init__(self) -> None:
        count = 1 if self.channels == "L" else 3
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) not in (1, count):
                raise DataError(f"{name} has {len(value)} values for {count} channels", hint="give one per channel")
        if self.scale == 0 or np.any(np.asarray(self.std) == 0):
            raise DataError("scale and std must not be zero", hint="leave them out where they are not needed")
        if self.dtype == "uint8" and (self.scale, self.mean, self.std) != (1 / 255, 0.0, 1.0):
            raise DataError("pixels of dtype uint8 take no scale, mean or std", hint="leave these or the dtype out")

    def pixels(self, image: Image, name: str) -> NDArray[np.uint8]:
        """Resize and crop one image: (H, W, C) with the channels in order.

        Raises:
            DataError: the image is too small for the crop, or has 16 bits.
        """
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{name} has more than 8 bits per pixel (mode {image.mode})", hint="convert it to 8 bits")
        image = image.convert("L" if self.channels == "L" else "RGB")
        if self.resize is not None:
            image = self._resized(image, self.resize)
        pixels: NDArray[np.uint8] = np.asarray(image)
        if self.crop is not None:
            pixels = _centre(pixels, self.crop, name)
        if self.channels == "L":
            return pixels[..., None]
        return pixels[..., ::-1] if self.channels == "BGR" else pixels

    def batch(
        self, pixels: Sequence[NDArray[np.uint8]], names: Sequence[str]
    ) -> NDArray[np.float32] | NDArray[np.uint8]:
        """Stack and scale what :meth:`pixels` makes of images: (N, C, H, W), or (N, H, W, C).

        Raises:
            DataError: an image has another size than the first.
        """
        for image, name in zip(pixels, names, strict=True):
            if image.shape != pixels[0].shape:
                raise DataError(
                    f"{name} is {_size(image)} where {names[0]} is {_size(pixels[0])}: one batch needs one size",
                    hint="give --preprocess with a resize and a crop",
                )
        batch = np.stack(pixels)
        if self.dtype == "uint8":
            return self._laid_out(batch)
        scaled = batch.astype(np.float32) * np.float32(self.scale)
        standardised = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return self._laid_out(standardised)

    def apply_to_array(
        self, images: NDArray[np.uint8], indices: Iterable[int]
    ) -> NDArray[np.float32] | NDArray[np.uint8]:
        """The same for uint8 images (N, H, W, C), with one, three or four channels, or (N, H, W).

        `indices` number the images in errors.

                Raises:
                    DataError: see :meth:`pixels` and :meth:`batch`.
        """
        from PIL import Image

        names = [f"image {index}" for index in indices]
        flat = images[..., 0] if images.shape[3:] == (1,) else images
        pixels = [self.pixels(Image.fromarray(image), name) for image, name in zip(flat, names, strict=True)]
        return self.batch(pixels, names)

    def _resized(self, image: Image, size: int | tuple[int, int]) -> Image:
        from PIL.Image import Resampling

        height, width = size if isinstance(size, tuple) else _shorter_side(image.height, image.width, size)
        if (height, width) == (image.height, image.width):
            return image
        return image.resize((width, height), Resampling[self.interpolation.upper()])

    def _laid_out(self, batch: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(batch if self.layout == "NHWC" else batch.transpose(0, 3, 1, 2))


def are_images(array: NDArray[Any]) -> bool:
    """Whether an array is taken for images: uint8 of shape (N, H, W), or (N, H, W, C) with C of 1, 3 or 4."""
    return array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3, 4)))


def image_arrays(arrays: Mapping[str, NDArray[Any]], preprocess: Preprocess | None, source: str) -> list[str]:
    """The names of the arrays that are images; `source` is what to call the data in errors.

    Raises:
        DataError: there are some and no `preprocess`, or the other way round.
    """
    images = sorted(name for name, array in arrays.items() if are_images(array))
    if images and preprocess is None:
        raise DataError(
            f"{source}: {images[0]} holds uint8 images of shape {arrays[images[0]].shape}, and nothing says how they become input",
            hint=f"give --preprocess file.json, for instance {EXAMPLE}",
        )
    if preprocess is not None and not images:
        described = ", ".join(f"{name} is {array.dtype} {array.shape}" for name, array in arrays.items())
        raise DataError(
            f"{source} holds no images to preprocess: {described}",
            hint="leave --preprocess out, or store images as uint8 (N, height, width, channels)",
        )
    return images


def load_preprocess(path: str | Path) -> Preprocess:
    """Read a file such as `{"resize": 256, "crop": 224, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}`.

    Raises:
        DataError: the file is missing or not JSON, a key is unknown, or a value is not of its kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint="--preprocess names a JSON file") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", hint=f"for instance {EXAMPLE}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object", hint=f"for instance {EXAMPLE}")
    return parse_preprocess(content, str(path))


def parse_preprocess(content: Mapping[str, Any], source: str) -> Preprocess:
    """Check keys and values; `source` is what to call them in errors.

    Raises:
        DataError: a key is unknown, or a value is not of its kind.
    """
    known = [field.name for field in fields(Preprocess)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(known)}"
            raise DataError(f"{source}: unknown key {key!r}", hint=hint)
    values = {}
    for key, value in content.items():
        what, parse = _KINDS[key]
        try:
            values[key] = parse(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"{source}: {key} is {json.dumps(value)}", hint=f"it should be {what}") from error
    try:
        return Preprocess(**values)
    except DataError as error:
        raise DataError(f"{source}: {error.message}", hint=error.hint) from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _numbers(value: Any) -> float | tuple[float, ...]:
    return tuple(map(_number, value)) if isinstance(value, list) else _number(value)


def _side(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _sides(value: Any) -> int | tuple[int, int] | None:
    if isinstance(value, list):
        height, width = map(_side, value)
        return height, width
    return None if value is None else _side(value)


def _one_of(choices: tuple[str, ...]) -> tuple[str, Callable[[Any], str]]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return f"one of {', '.join(choices)}", parse


_LENGTH = ("a positive integer or [height, width]", _sides)
_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "resize": _LENGTH,
    "crop": _LENGTH,
    "interpolation": _one_of(get_args(Interpolation)),
    "channels": _one_of(get_args(Channels)),
    "scale": ("a number", _number),
    "mean": ("a number or a list with one per channel", _numbers),
    "std": ("a number or a list with one per channel", _numbers),
    "layout": _one_of(get_args(Layout)),
    "dtype": _one_of(get_args(PixelType)),
}


def _shorter_side(height: int, width: int, length: int) -> tuple[int, int]:
    """The size with that shorter side and the same proportions; the longer side is rounded down, as torchvision does."""
    if height <= width:
        return length, int(length * width / height)
    return int(length * height / width), length


def _centre(pixels: NDArray[np.uint8], size: int | tuple[int, int], name: str) -> NDArray[np.uint8]:
    height, width = (size, size) if isinstance(size, int) else size
    spare_height, spare_width = pixels.shape[0] - height, pixels.shape[1] - width
    if spare_height < 0 or spare_width < 0:
        raise DataError(f"{name} is {_size(pixels)}, smaller than the crop of {height}x{width}", hint="resize it first")
    top, left = round(spare_height / 2), round(spare_width / 2)
    return pixels[top : top + height, left : left + width]


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
