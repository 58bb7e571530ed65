"""Data in a numpy archive: inputs, and labels where accuracy is wanted."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from bnctl.data.batches import LABEL_KEYS, Batch, CountedBatches, class_labels, located, spread
from bnctl.data.preprocess import Preprocess, image_arrays
from bnctl.data.stored import map_arrays
from bnctl.errors import DataError

_FORM = "np.savez(file, x=inputs, y=class_numbers)"


def read_npz(
    path: Path, *, batch_size: int = 32, preprocess: Preprocess | None = None, limit: int | None = None
) -> CountedBatches:
    """Batches of a `.npz` file, in the file's order.

    The array `x`, alone, is the one positional input. Several arrays are inputs by name. `y` (or `label`, `labels`, `target`, `targets`) are the class
    numbers. Axis 0 counts the samples everywhere.

    Images, that is uint8 arrays (N, H, W) or (N, H, W, C), need `preprocess`, and nothing else takes it: how pixels become
    input is for the user to say (`{"dtype": "uint8", "layout": "NHWC"}`: not at all). Images are converted batch by batch.
    Arrays that `np.savez` stored stay in the file, which is read in full once for its checksums; those of `np.savez_compressed` are
    held in memory.

    Args:
        path: the file.
        batch_size: samples per batch; the last batch may be smaller.
        preprocess: for images.
        limit: at most this many samples, evenly spaced.

    Raises:
        DataError: the file is damaged or holds objects, an input is missing or of another length, labels are no class
            numbers, or images and `preprocess` do not come together.
    """
    arrays = load_arrays(path)
    inputs, labels = _parts(arrays, path)
    samples = _same_length(arrays, path)
    images = image_arrays(inputs, preprocess, str(path))
    kept = spread(samples, limit)

    def value(name: str, chosen: NDArray[np.int64]) -> NDArray[Any]:
        part = inputs[name][chosen]  # a copy: mapped arrays are read-only, and not aligned
        return preprocess.apply_to_array(part, map(int, chosen)) if preprocess and name in images else part

    def read(places: Iterable[slice]) -> Iterator[Batch]:
        for place in places:
            chosen = kept[place]
            values = {name: value(name, chosen) for name in inputs}
            args = (values.pop("x"),) if set(values) == {"x"} else ()
            yield Batch(args, values, None if labels is None else labels[chosen], place.start)

    return located(len(kept), batch_size, read)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a file by name: mapped (`np.memmap`, read-only) where they are stored as they are, else in memory.

    Raises:
        DataError: the file is damaged, holds objects, or is no archive.
    """
    try:
        # Opened here, for numpy leaves the file open where the archive is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, NpzFile):
                raise DataError(f"{path} holds a single array, not named ones", hint=_FORM)
            mapped = map_arrays(path)
            return {name: mapped[name] if name in mapped else archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        hint = "store numbers, not objects" if "pickle" in str(error).lower() else _FORM
        raise DataError(f"{path} cannot be read: {error}", hint=hint) from error


def _parts(arrays: dict[str, NDArray[Any]], path: Path) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None]:
    labelling = [name for name in LABEL_KEYS if name in arrays]
    inputs = {name: array for name, array in arrays.items() if name not in LABEL_KEYS}
    held = ", ".join(arrays) or "nothing"
    if not inputs:
        raise DataError(f"{path} holds no input, only {held}", hint=_FORM)
    if len(labelling) > 1:
        raise DataError(f"{path} has labels under {' and '.join(labelling)}", hint="leave one")
    if not labelling:
        return inputs, None
    labels = class_labels(arrays[labelling[0]])
    if labels is None:
        found = arrays[labelling[0]]
        raise DataError(
            f"{path}: {labelling[0]} holds no class numbers but {found.dtype} of shape {found.shape}",
            hint="labels are integers, one per sample; leave them out where accuracy is not wanted",
        )
    return inputs, labels


def _same_length(arrays: dict[str, NDArray[Any]], path: Path) -> int:
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(
            f"{path}: the arrays differ in their number of samples: {described}", hint="axis 0 counts samples"
        )
    samples = next(iter(lengths.values()))
    if samples == 0:
        raise DataError(f"{path} holds no samples", hint=_FORM)
    return samples
