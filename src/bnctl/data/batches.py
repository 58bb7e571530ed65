"""Batches: what a model is fed with, and how the items of the user's own loaders are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import BnctlError, DataError

LABEL_KEYS = ("y", "label", "labels", "target", "targets")

_FORMS = "a batch is an array or tensor, (x, y), (x1, x2, ..., y) or a dict of keyword inputs"


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of one call of a model.

    Attributes:
        args: positional inputs: numpy arrays, or tensors and containers as the user's loader gave them.
        kwargs: inputs by name.
        labels: class numbers (N,) int64, where known.
        start: number of the first sample in the data; the others follow it.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: NDArray[np.int64] | None = None
    start: int = 0

    @property
    def size(self) -> int:
        """Number of samples: the length of the first input that has one.

        Of an array that is axis 0; a list or tuple (of images, say) has one item per sample; dicts and dataclasses are
        looked into. One, where no input has a length.
        """
        lengths = (_length(value) for value in (*self.args, *self.kwargs.values()))
        return next((length for length in lengths if length is not None), 1)

    def rows(self, indices: NDArray[np.int64]) -> Batch:
        """Some samples of the batch, as copies: of every part whose length is the batch's size, those at `indices` (K,)."""
        size = self.size
        return replace(
            self,
            args=tuple(_rows(value, size, indices) for value in self.args),
            kwargs={name: _rows(value, size, indices) for name, value in self.kwargs.items()},
            labels=None if self.labels is None else self.labels[indices],
        )


@dataclass(frozen=True)
class Batches:
    """Batches that can be read again and again.

    Attributes:
        read: `read(first, step)` is one pass, over every `step`-th batch from `first` on, each with its number.
    """

    read: Callable[[int, int], Iterator[tuple[int, Batch]]]

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.every())

    def every(self, first: int = 0, step: int = 1) -> Iterator[tuple[int, Batch]]:
        """The batches number `first`, `first + step`, `first + 2 step`, ..., each with its number: the share of one worker out of `step`.

        The others are neither read nor decoded where the source knows where its samples are (npz, folder, random); streams and
        loaders are read in full.
        """
        return self.read(first, step)


@dataclass(frozen=True)
class CountedBatches(Batches):
    """Batches of which the number is known."""

    count: int

    def __len__(self) -> int:
        return self.count


def located(samples: int, batch_size: int, read: Callable[[Iterable[slice]], Iterator[Batch]]) -> CountedBatches:
    """Batches of a source that knows where its samples are: `read` makes the batches of the samples in some places.

    The last batch may be smaller.
    """
    starts = range(0, samples, batch_size)

    def every(first: int, step: int) -> Iterator[tuple[int, Batch]]:
        share = starts[first::step]
        numbers = range(first, len(starts), step)
        yield from zip(numbers, read(slice(i, min(i + batch_size, samples)) for i in share), strict=True)

    return CountedBatches(every, len(starts))


def streamed(read: Callable[[], Iterator[Batch]], count: int | None = None) -> Batches:
    """Batches of a source that is read from its start: `read` is one pass."""

    def every(first: int, step: int) -> Iterator[tuple[int, Batch]]:
        yield from islice(enumerate(read()), first, None, step)

    return Batches(every) if count is None else CountedBatches(every, count)


def as_batches(source: Iterable[Any], *, name: str = "data") -> Batches:
    """Read the items of an iterable, such as a torch `DataLoader`, as batches. Arrays and tensors are kept as they are.

    | item | inputs | labels |
    |---|---|---|
    | array, tensor | itself | none |
    | `(x, y)` | `x` | `y` |
    | `(x1, x2, ..., y)` | all but the last, by position; end with None where there are no labels | `y` |
    | `(x,)` | `x` | none |
    | a list of images: arrays with three axes each | the list, as detection models take it | none |
    | any other list | like a tuple: that is what `DataLoader` makes of one | |
    | dict | by name | under `y`, `label`, `labels`, `target` or `targets` |
    | `Batch` | as it is | as it is |
    | any other object | itself | none |

    A list inside of a tuple is one input: `(images, targets)`. Labels are whole numbers, one per sample; labels of other kinds
    (masks, boxes, regression targets) are ignored. Batches without a sample are skipped.

    Args:
        source: read once per pass. An iterator can be read only once; a second pass raises.
        name: what to call it in errors.

    Returns:
        Batches, with a length where `source` has one.

    Raises:
        DataError: now: not an iterable of batches. During a pass: there are no samples, an item cannot be read, labels do
            not match the samples, the loader raises, or an iterator is read again.
    """
    if isinstance(source, Batches):
        return source
    require_items(source, name)
    items = _Once(source, name) if isinstance(source, Iterator) else source

    def read() -> Iterator[Batch]:
        return read_items(items, name)

    return streamed(read, _count(source))


def first_of(batches: Iterable[Batch]) -> Batch:
    """The first batch.

    Raises:
        DataError: there is none.
    """
    for batch in batches:
        return batch
    raise DataError("the data hold no batch", hint="give data that are not empty")


def require_items(value: object, name: str) -> None:
    """Refuse what is no iterable of batches, such as a single tensor, of which iteration would make rows.

    Raises:
        DataError: it is none.
    """
    if isinstance(value, (str, bytes, Mapping)) or hasattr(value, "shape") or not hasattr(value, "__iter__"):
        raise DataError(
            f"{name} is {_article(value)}, not an iterable of batches",
            hint=f"put a single batch into a list: [batch]; {_FORMS}",
        )


def read_items(items: Iterable[Any], name: str) -> Iterator[Batch]:
    """One pass over a user's items; see :func:`as_batches`."""
    samples = 0
    for index, item in enumerate(_guarded(items, name)):
        batch = as_batch(item, where=f"{name}, batch {index}")
        if batch.size:
            yield replace(batch, start=samples)
            samples += batch.size
    if not samples:
        raise DataError(
            f"{name} holds no samples",
            hint="give data that are not empty; an iterator that was read already is, so give one that can be read again",
        )


def as_batch(item: Any, *, where: str = "the batch") -> Batch:
    """Read one item; see :func:`as_batches`.

    Raises:
        DataError: the item cannot be read, or its labels do not match its samples.
    """
    if isinstance(item, Batch):
        return item
    if item is None or isinstance(item, (str, bytes, int, float, complex)):
        raise DataError(f"{where} is {_article(item)}", hint=_FORMS)
    args, kwargs, labels = _parts(item, where)
    if not (args or kwargs):
        raise DataError(f"{where} holds no input", hint=_FORMS)
    batch = Batch(args, kwargs, class_labels(labels))
    if batch.labels is not None and len(batch.labels) != batch.size:
        raise DataError(f"{where} has {batch.size} samples and {len(batch.labels)} labels", hint="give one per sample")
    return batch


def class_labels(value: Any) -> NDArray[np.int64] | None:
    """Class numbers (N,) int64, if the value holds whole numbers in the shape (N,) or (N, 1); else None."""
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors without a numpy type
        return None
    if array.ndim not in (1, 2) or array.shape[1:] not in ((), (1,)) or array.dtype.kind not in "iubf":
        return None
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        return None
    return array.reshape(len(array)).astype(np.int64)


def spread(samples: int, limit: int | None) -> NDArray[np.int64]:
    """Ascending indices of at most `limit` of the samples, evenly spaced: data are often sorted by class."""
    kept = samples if limit is None else min(samples, limit)
    return np.arange(kept, dtype=np.int64) * samples // max(kept, 1)


class _Once:
    """An iterator that says so when it is asked for a second pass."""

    def __init__(self, iterator: Iterator[Any], name: str) -> None:
        self._iterator = iterator
        self._name = name
        self._used = False

    def __iter__(self) -> Iterator[Any]:
        if self._used:
            raise DataError(
                f"{self._name} is an iterator ({type(self._iterator).__name__}) that was read already, "
                "and a second pass is needed",
                hint="give something that can be read again: a list, a DataLoader, or an object with __iter__",
            )
        self._used = True
        return self._iterator


def _guarded(items: Iterable[Any], name: str) -> Iterator[Any]:
    index = 0
    try:
        for item in items:
            yield item
            index += 1
    except BnctlError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise DataError(
            f"{name} fails at batch {index}: {type(error).__name__}: {error}", hint="the cause is in the loader's code"
        ) from error


def _parts(item: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs, labels."""
    if isinstance(item, Mapping):
        named = [key for key in LABEL_KEYS if key in item]
        if len(named) > 1:
            raise DataError(f"{where} has labels under {' and '.join(named)}", hint="leave one")
        inputs = {str(key): value for key, value in item.items() if key not in named}
        return (), inputs, item[named[0]] if named else None
    images = isinstance(item, list) and all(getattr(part, "ndim", 0) == 3 for part in item)
    if not isinstance(item, (tuple, list)) or images:
        return (item,), {}, None
    return (tuple(item[:-1]), {}, item[-1]) if len(item) > 1 else (tuple(item), {}, None)


def _length(value: Any) -> int | None:
    if getattr(value, "is_nested", False):  # it knows no other size
        return int(value.size(0))
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else None
    if isinstance(value, (list, tuple)):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else _fields(value).values()
    return next((length for length in map(_length, inner) if length is not None), None)


def _rows(value: Any, size: int, indices: NDArray[np.int64]) -> Any:
    if hasattr(value, "shape"):
        return value[indices] if _length(value) == size else value
    if isinstance(value, (list, tuple)):
        chosen = (value[i] for i in indices)
        return value if len(value) != size else list(chosen) if isinstance(value, list) else tuple(chosen)
    if isinstance(value, Mapping):
        return {key: _rows(inner, size, indices) for key, inner in value.items()}
    fields = {key: _rows(inner, size, indices) for key, inner in _fields(value).items()}
    return replace(value, **fields) if fields else value


def _fields(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _count(source: object) -> int | None:
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:  # a DataLoader of an iterable dataset
        return None


def _article(item: object) -> str:
    return "None" if item is None else f"a {type(item).__name__}"
