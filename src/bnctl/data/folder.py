"""`folder/`: one subfolder per class, images in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.data.batches import Batch
from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class FolderData:
    """Images on disk, decoded batch by batch; the label is the position of the class's name in alphabetical order."""

    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]
    batch_size: int
    preprocess: Preprocess

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.files), self.batch_size):
            part = self.files[start : start + self.batch_size]
            pixels = [self._decode(path) for path, _ in part]
            shapes = {p.shape for p in pixels}
            if len(shapes) > 1:
                sizes = ", ".join(str(s) for s in sorted(shapes)[:3])
                raise DataError(
                    f"images of different sizes in one batch: {sizes}", hint="give --preprocess with resize and crop"
                )
            labels = np.array([label for _, label in part], np.int64)
            yield Batch((self.preprocess.images(np.stack(pixels)),), {}, labels)

    def _decode(self, path: Path) -> NDArray[Any]:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as picture:
                return self.preprocess.image(picture)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} cannot be decoded: {error}", hint="remove or repair the image") from error


def open_folder(
    path: Path, *, batch_size: int, preprocess: Preprocess | None = None, limit: int | None = None
) -> FolderData:
    """Batches of an image folder.

    With a limit, samples are taken in turn from all classes, so that a part of the data still shows every class.

    Raises:
        DataError: there are no class folders, or no images in them.
    """
    classes = tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise DataError(
            f"{path} has no subfolders", hint="put the images of each class into a folder of its own: folder/cat/1.png"
        )
    per_class = [
        [(file, label) for file in sorted((path / name).iterdir()) if file.suffix.lower() in SUFFIXES]
        for label, name in enumerate(classes)
    ]
    files = [entry for entries in per_class for entry in entries]
    if not files:
        raise DataError(f"{path} holds no images", hint=f"known suffixes are {', '.join(sorted(SUFFIXES))}")
    if limit is not None and limit < len(files):
        longest = max(map(len, per_class))
        files = sorted(
            [entries[i] for i in range(longest) for entries in per_class if i < len(entries)][:limit],
            key=lambda e: (e[1], e[0]),
        )
    return FolderData(tuple(files), classes, batch_size, preprocess or Preprocess())
