"""`file.npz`: arrays `x` and, where accuracy is wanted, `y`; or keyword inputs by name."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.data.arrays import ArrayData
from bnctl.data.batches import LABEL_KEYS, as_labels
from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError


def open_npz(
    path: Path, *, batch_size: int, preprocess: Preprocess | None = None, limit: int | None = None
) -> ArrayData:
    """Batches of an npz file. Nothing is unpickled.

    The array `x` is the one positional input; without it, every array is a keyword input of its name. Images of uint8 (N, H, W, C) need a preprocessing,
    which says how they become floats: a guess would be wrong without a word.

    Raises:
        DataError: the file cannot be read, holds objects, or its arrays have different lengths.
    """
    arrays = _read(path)
    names = [key for key in LABEL_KEYS if key in arrays]
    labels = as_labels(arrays.pop(names[0])) if names else None
    if not arrays:
        raise DataError(f"{path} holds no inputs", hint="save the inputs as x: np.savez(path, x=inputs, y=labels)")
    sizes = {
        name: len(a) if a.ndim else None
        for name, a in {**arrays, **({} if labels is None else {names[0]: labels})}.items()
    }
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"{path}: the arrays have different lengths: {sizes}", hint="all arrays have one entry per sample"
        )
    if None in sizes.values() or 0 in sizes.values():
        raise DataError(f"{path} holds no samples", hint="the first axis of every array counts the samples")
    x = arrays.pop("x", None)
    if x is not None and x.dtype == np.uint8 and preprocess is None:
        raise DataError(
            f"{path}: x holds uint8 of shape {x.shape}: images need a preprocessing",
            hint='give --preprocess file.json, for example {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}',
        )
    args = () if x is None else (x[:limit],)
    kwargs = {name: a[:limit] for name, a in arrays.items()} if x is None else {}
    transform = preprocess.images if preprocess is not None else None
    return ArrayData(args, kwargs, None if labels is None else labels[:limit], batch_size, transform)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", hint="check --data") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", hint="write it with np.savez; arrays of objects are not read"
        ) from error
