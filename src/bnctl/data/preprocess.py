"""From an image to what a network takes: resize, crop, scale, normalise, order of axes and channels."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocess:
    """``y = (scale * x - mean) / std``, float32, after resize and centre crop.

    Args:
        resize: length of the shorter side, or (height, width); bilinear, antialiased. None: as it is.
        crop: side of the square that is cut from the centre. None: nothing is cut.
        mean, std: per channel, in the units of scaled values.
        scale: factor for the pixel values 0 to 255.
        channels: "RGB", "BGR" or "L" (grey).
        layout: "NCHW" or "NHWC".
    """

    resize: int | tuple[int, int] | None = None
    crop: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    channels: str = "RGB"
    layout: str = "NCHW"

    def images(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Images (N, H, W, C) or (N, H, W) with values 0 to 255, as input of the network. Floats pass through: they are taken as preprocessed.

        Raises:
            DataError: the number of channels does not fit mean and std.
        """
        if pixels.dtype != np.uint8:
            return pixels.astype(np.float32, copy=False)
        if self.resize is not None or self.crop is not None:
            from PIL import Image

            pixels = np.stack([np.asarray(self._cut(Image.fromarray(p))) for p in pixels])
        x = pixels[..., None] if pixels.ndim == 3 else pixels
        if self.channels == "BGR":
            x = x[..., ::-1]
        if len(self.mean) not in {1, x.shape[-1]} or len(self.std) not in {1, x.shape[-1]}:
            raise DataError(
                f"images have {x.shape[-1]} channels, mean and std {len(self.mean)} and {len(self.std)}",
                hint="correct --preprocess",
            )
        y = (x.astype(np.float32) * np.float32(self.scale) - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(y.transpose(0, 3, 1, 2) if self.layout == "NCHW" else y)

    def image(self, picture: Image) -> NDArray[np.uint8]:
        """A decoded picture, resized and cropped, as (H, W, C)."""
        converted = self._cut(picture.convert("L" if self.channels == "L" else "RGB"))
        pixels = np.asarray(converted)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _cut(self, picture: Image) -> Image:
        from PIL.Image import Resampling

        if self.resize is not None:
            if isinstance(self.resize, int):
                factor = self.resize / min(picture.size)
                size = (round(picture.width * factor), round(picture.height * factor))
            else:
                size = (self.resize[1], self.resize[0])
            picture = picture.resize(size, Resampling.BILINEAR)
        if self.crop is not None:
            if min(picture.size) < self.crop:
                raise DataError(
                    f"an image of {picture.size[0]}x{picture.size[1]} is smaller than the crop {self.crop}",
                    hint="resize first",
                )
            left, top = (picture.width - self.crop) // 2, (picture.height - self.crop) // 2
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        return picture


def load_preprocess(path: Path) -> Preprocess:
    """Read a preprocessing from JSON.

    Raises:
        DataError: the file cannot be read, has an unknown key, or a value of the wrong kind.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            hint='it is JSON: {"resize": 256, "crop": 224, "mean": [...], "std": [...]}',
        ) from error
    known = [f.name for f in fields(Preprocess)]
    if not isinstance(document, dict):
        raise DataError(f"{path} is not a JSON object", hint=f"its keys are {', '.join(known)}")
    for key in document:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise DataError(
                f"{path}: unknown key {key!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(known)}",
            )
    try:
        return _checked(document)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}", hint=f"its keys are {', '.join(known)}") from error


def _checked(document: dict[str, Any]) -> Preprocess:
    given = dict(document)
    for key in ("mean", "std"):
        if key in given:
            value = given[key]
            given[key] = tuple(float(v) for v in (value if isinstance(value, list) else [value]))
    if any(v == 0 for v in given.get("std", ())):
        raise ValueError("std is 0")
    resize = given.get("resize")
    if resize is not None:
        given["resize"] = int(resize) if isinstance(resize, (int, float)) else (int(resize[0]), int(resize[1]))
    if given.get("crop") is not None:
        given["crop"] = int(given["crop"])
    for key, allowed in (("channels", {"RGB", "BGR", "L"}), ("layout", {"NCHW", "NHWC"})):
        if key in given and given[key] not in allowed:
            raise ValueError(f"{key} is {given[key]!r}, not one of {', '.join(sorted(allowed))}")
    return Preprocess(**given)
