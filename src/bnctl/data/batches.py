"""A batch, and whatever a user's loader yields as batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import DataError

LABEL_KEYS = ("y", "label", "labels", "target", "targets")


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of a model for several samples.

    Args:
        args: positional inputs; numpy arrays, or tensors and containers as the user's loader gave them.
        kwargs: keyword inputs.
        labels: int64 (N,), where known.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None

    @property
    def size(self) -> int:
        """Number of samples: the first axis of the first array, or the length of the first list (detection models take a list of images)."""
        for value in (*self.args, *self.kwargs.values()):
            size = _samples(value)
            if size is not None:
                return size
        return 0 if self.labels is None else len(self.labels)


def _samples(value: Any) -> int | None:
    if getattr(value, "ndim", 0):
        return int(value.shape[0])
    if isinstance(value, list):
        return len(value)
    if isinstance(value, (tuple, Mapping)):
        parts = value.values() if isinstance(value, Mapping) else value
        return next((n for part in parts if (n := _samples(part)) is not None), None)
    return None


def as_batch(item: Any) -> Batch:
    """One item of a loader as a batch.

    | item | means |
    |---|---|
    | a tensor or array | the one positional input |
    | `(x, y)` | input and labels |
    | a dict | keyword inputs; `y`, `label`, `labels`, `target` or `targets` are labels |
    | a list | one positional input: detection models take a list of images |
    | a :class:`Batch` | itself |

    Raises:
        DataError: anything else, or labels that are no whole numbers.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, tuple):
        if len(item) == 2:
            return Batch((item[0],), {}, as_labels(item[1]))
        if len(item) == 1:
            return Batch((item[0],))
        raise DataError(
            f"a batch is a tuple of {len(item)}",
            hint="yield x, (x, y), or a dict of keyword inputs; for several positional inputs a bnctl.data.batches.Batch",
        )
    if isinstance(item, Mapping):
        labels = [key for key in LABEL_KEYS if key in item]
        inputs = {str(key): value for key, value in item.items() if key not in labels}
        return Batch((), inputs, as_labels(item[labels[0]]) if labels else None)
    if hasattr(item, "shape") or isinstance(item, list):
        return Batch((item,))
    raise DataError(
        f"a batch is a {type(item).__name__}", hint="yield a tensor or array, (x, y), or a dict of keyword inputs"
    )


def as_labels(value: Any) -> NDArray[np.int64]:
    """Class numbers as int64 (N,).

    Raises:
        DataError: they are not whole numbers, one per sample.
    """
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    whole = array.dtype.kind in "iub" or (array.dtype.kind == "f" and bool(np.all(array == np.round(array))))
    if array.ndim != 1 or not whole:
        raise DataError(
            f"labels of shape {array.shape} and type {array.dtype}", hint="labels are class numbers, one per sample"
        )
    return array.astype(np.int64)


class _Batches:
    """An iterable of anything, as batches; a loader that raises is named with the batch."""

    def __init__(self, source: Iterable[Any], name: str) -> None:
        self.source, self.name = source, name
        self.used = False

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self.source)
        if iterator is self.source:
            if self.used:
                raise DataError(
                    f"{self.name} can be gone through only once",
                    hint="give something that can be iterated again, such as a list or a DataLoader",
                )
            self.used = True
        number = 0
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except DataError:
                raise
            except Exception as error:
                raise DataError(
                    f"{self.name} fails at batch {number}: {type(error).__name__}: {error}",
                    hint="run the loader on its own",
                ) from error
            yield as_batch(item)
            number += 1
        if number == 0:
            raise DataError(f"{self.name} holds no batch", hint="check the data")


def as_batches(source: Iterable[Any], *, name: str = "data") -> Iterable[Batch]:
    """What the Python API and `module:callable` take as data; can be gone through as often as `source` can.

    Raises:
        DataError: on iteration: no batch at all, an item that is no batch, a second pass over a generator, or whatever the loader raises.
    """
    return source if isinstance(source, _Batches) else _Batches(source, name)


def first_of(batches: Iterable[Batch]) -> Batch:
    """The first batch.

    Raises:
        DataError: there is none.
    """
    for batch in batches:
        return batch
    raise DataError("the data hold no batch", hint="check the data")
