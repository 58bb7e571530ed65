"""Data in a folder of images, one subfolder per class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bnctl.data.ahead import map_groups
from bnctl.data.batches import Batch, CountedBatches, located, spread
from bnctl.data.images import ImageFile
from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FORM = f"one subfolder per class with images ({', '.join(sorted(SUFFIXES))}) in it"


def read_folder(
    folder: Path,
    *,
    batch_size: int = 32,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    limit: int | None = None,
    workers: int = 0,
) -> CountedBatches:
    """Batches of the images in a folder.

    The label is the position of the subfolder among their sorted names. The order is random but always the same for a seed,
    so that a batch has images of many classes; how they are cut into batches does not change it. A folder with images
    and no subfolders has no labels. Hidden files and files that are no images by their names are passed over.

    Args:
        folder: one subfolder per class; images may lie deeper in it.
        batch_size: images per batch; the last batch may be smaller.
        preprocess: left out, images are RGB, (N, 3, H, W) float32 between 0 and 1.
        seed: of the order.
        limit: at most this many images, from all classes in proportion.
        workers: threads that decode ahead; the batches are the same for any number.

    Raises:
        DataError: now: there are no images, or a class has none. During a pass: an image cannot be read, or does not have the
            size of the others in its batch.
    """
    paths, labels = _listing(folder)
    kept = np.random.default_rng(seed).permutation(spread(len(paths), limit))
    steps = preprocess or Preprocess()

    def read(places: Iterable[slice]) -> Iterator[Batch]:
        groups = (((place.start, kept[place]), [_image(paths[i]) for i in kept[place]]) for place in places)
        for (start, chosen), pixels in map_groups(lambda image: image.pixels(steps), groups, workers=workers):
            images = steps.batch(pixels, [str(paths[i]) for i in chosen])
            yield Batch((images,), {}, None if labels is None else labels[chosen], start)

    return located(len(kept), batch_size, read)


def _image(path: Path) -> ImageFile:
    return ImageFile(str(path), lambda: path.open("rb"))


def _listing(folder: Path) -> tuple[list[Path], NDArray[np.int64] | None]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = _images(folder.glob("*"))
    if classes and loose:
        raise DataError(f"{folder} has images beside its subfolders, such as {loose[0].name}", hint=_FORM)
    if not classes:
        if not loose:
            raise DataError(f"{folder} holds no images", hint=_FORM)
        return loose, None
    found = [_images(path.rglob("*")) for path in classes]
    empty = [path.name for path, images in zip(classes, found, strict=True) if not images]
    if empty:
        raise DataError(f"{folder}: no images in {', '.join(empty)}", hint=f"{_FORM}; labels follow their sorted names")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(images) for images in found])
    return [path for images in found for path in images], labels


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
