"""Tables (Arrow) as batches: which columns are images, arrays and labels, and their values."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bnctl.data.ahead import map_groups
from bnctl.data.batches import LABEL_KEYS, Batch, class_labels
from bnctl.data.images import ImageFile
from bnctl.data.preprocess import Preprocess, image_arrays
from bnctl.errors import DataError

_LABEL_NAMES = (*LABEL_KEYS, "cls")  # the last is webdataset's


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        images: encoded images, as `datasets.Image` stores them.
        arrays: numbers or nested lists of numbers.
        label: class numbers, if there are any.
    """

    images: tuple[str, ...]
    arrays: tuple[str, ...]
    label: str | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.images, *self.arrays, *([] if self.label is None else [self.label])]


def choose_columns(schema: Any, source: str) -> Columns:
    """The columns of a `pyarrow.Schema` to read.

    Labels are under `y`, `label`, `labels`, `target`, `targets` or `cls`, else in the one column of `datasets.ClassLabel`. Inputs are the
    columns of images, if there are any, else those of numbers. What is left, such as text, is not read.

    Raises:
        DataError: there is no input, there are inputs beside one called `x`, or labels in more than one column.
    """
    types = {field.name: field.type for field in schema}
    held = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "nothing"
    labels = [name for name in _LABEL_NAMES if name in types] or _class_labels(schema)
    if len(labels) > 1:
        raise DataError(f"{source} has labels in {' and '.join(labels)}", hint="leave one")
    images = tuple(name for name, kind in types.items() if _is_image(kind))
    arrays = tuple(name for name, kind in types.items() if not images and name not in labels and _is_numeric(kind))
    inputs = images or arrays
    if not inputs:
        raise DataError(
            f"{source} holds no images and no numbers, only {held}", hint="call the columns x and y, or image and label"
        )
    return Columns(images, arrays, labels[0] if labels else None)


def read_tables(
    tables: Iterable[tuple[int, Any]],
    columns: Columns,
    *,
    fetch: Callable[[str], BinaryIO],
    preprocess: Preprocess | None,
    workers: int,
    source: str,
) -> Iterator[Batch]:
    """A batch of each table (`pyarrow.Table`), given with the number of its first sample.

    One input is positional; several are keyword inputs by the names of their columns. Images are decoded as those of a folder are; arrays keep
    their type, and uint8 arrays (N, H, W) or (N, H, W, C) are images that need `preprocess`. `fetch` opens images that lie beside the table.

    Raises:
        DataError: an image cannot be decoded, arrays differ in shape, values are missing, labels are no class numbers, or arrays and
            `preprocess` do not go together.
    """
    steps = preprocess or Preprocess()
    groups = (((start, table), list(_images(table, columns, start, fetch, source))) for start, table in tables)
    for (start, table), decoded in map_groups(lambda image: (image.name, image.pixels(steps)), groups, workers=workers):
        samples = len(table)
        inputs: dict[str, NDArray[Any]] = {}
        for number, name in enumerate(columns.images):
            names, pixels = zip(*decoded[number * samples : (number + 1) * samples], strict=True)
            inputs[name] = steps.batch(pixels, names)
        if not columns.images:
            inputs = {name: _values(table.column(name), f"{source}: {name}") for name in columns.arrays}
            for name in image_arrays(inputs, preprocess, source):
                inputs[name] = steps.apply_to_array(inputs[name], range(start, start + samples))
        labels = None if columns.label is None else _labels(table.column(columns.label), f"{source}: {columns.label}")
        args = tuple(inputs.values()) if len(inputs) == 1 else ()
        yield Batch(args, {} if args else inputs, labels, start)


def _images(
    table: Any, columns: Columns, start: int, fetch: Callable[[str], BinaryIO], source: str
) -> Iterator[ImageFile]:
    for name in columns.images:
        for number, cell in enumerate(table.column(name).to_pylist(), start):
            content, path = ((cell or {}).get(part) for part in ("bytes", "path"))
            called = f"{source}, sample {number}" + (f" ({path})" if path else "")
            if content is not None:
                yield ImageFile(called, partial(io.BytesIO, content))
            elif path:
                yield ImageFile(called, partial(fetch, path))
            else:
                raise DataError(f"{called}: {name} is empty", hint="fill or remove it")


def _values(column: Any, where: str) -> NDArray[Any]:
    """Numbers, or nested lists of one shape, as an array (N, ...)."""
    array = column.combine_chunks()
    array = getattr(array, "storage", array)  # of an extension type, such as datasets.Array3D
    shape = [len(array)]
    while hasattr(array.type, "value_type"):
        _require_whole(array, where)
        parts = array.flatten()
        size = len(parts) // max(len(array), 1)
        if not np.all(np.asarray(array.value_lengths()) == size):
            raise DataError(
                f"{where}: the lists differ in length", hint="a batch needs arrays of one shape: pad or crop them"
            )
        shape.append(size)
        array = parts
    _require_whole(array, where)
    flat: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return flat.reshape(shape)


def _require_whole(array: Any, where: str) -> None:
    if array.null_count:
        raise DataError(f"{where}: {array.null_count} values are missing", hint="fill or remove them")


def _labels(column: Any, where: str) -> NDArray[np.int64]:
    labels = class_labels(column.to_pylist())
    if labels is None:
        raise DataError(f"{where} holds no class numbers but {column.type}", hint="labels are integers, one per sample")
    return labels


def _class_labels(schema: Any) -> list[str]:
    """What the `datasets` library notes in a schema about its columns."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    return [field.name for field in schema if features.get(field.name, {}).get("_type") == "ClassLabel"]


def _is_image(kind: Any) -> bool:
    return str(kind).startswith("struct<") and {field.name for field in kind} == {"bytes", "path"}


def _is_numeric(kind: Any) -> bool:
    kind = getattr(kind, "storage_type", kind)
    while hasattr(kind, "value_type") and not hasattr(kind, "index_type"):
        kind = kind.value_type
    try:
        return np.dtype(kind.to_pandas_dtype()).kind in "biuf"
    except (NotImplementedError, TypeError):  # structs, categories
        return False
