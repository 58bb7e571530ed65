"""A batch as other batches: of other sizes, shapes and values."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bnctl.data.batches import Batch

MOST = 6
"""Sizes that are varied by themselves; the others together."""

LONG = 128
"""Axes of so many entries can do with 32 less."""

_KINDS = {"float8": "", "float": "f", "bfloat": "f", "complex": "c", "int": "i", "uint": "u", "bool": "b"}


def other_batch_sizes(batch: Batch) -> list[Batch]:
    """The samples of a batch again as batches of other sizes: one and three, as far as the batch has another size.

    They find a batch size that surgery or export has baked into the model. See :func:`resized` for what is resized.
    """
    return [resized(batch, size) for size in (1, 3) if batch.size and size != batch.size]


def other_values(batch: Batch) -> Iterator[Batch]:
    """The batch with other float values: turned around, and larger and brighter.

    They find numbers of the example that surgery has baked in, and paths that the example did not take.
    """
    for factor, offset in ((-1.7, 0.0), (1.7, 3.0)):
        yield _mapped(batch, partial(_scaled, factor=factor, offset=offset))


def _scaled(value: Any, factor: float, offset: float) -> Any:
    return _as_it_was(value, value * factor + offset) if _is_array(value) and _kind(value) in {"f", "c"} else value


def _as_it_was(value: Any, other: Any) -> Any:
    """An array where one was: numpy makes a number of what it computes from a single one."""
    return np.asarray(other) if isinstance(value, np.ndarray) else other


def other_choices(batch: Batch, *, arrays: bool = True) -> list[list[Batch]]:
    """The batch with one choice made otherwise: for each choice that there is, the ways in which it might be made. A flag or a number of Python's, a mask,
    integers (in another order: they may be indices).

    Args:
        batch: as given.
        arrays: vary masks and integers in arrays, too, and not only what Python sees as such.
    """
    found = []
    for number, leaf in enumerate(leaves(batch)):
        if arrays or not _is_array(leaf):
            found.append([_with_leaf(batch, number, other) for other in _other_choices(leaf)])
    return [ways for ways in found if ways]


def _with_leaf(batch: Batch, number: int, leaf: Any) -> Batch:
    numbers = itertools.count()
    return _mapped(batch, lambda value: leaf if next(numbers) == number else value)


def _other_choices(value: Any) -> list[Any]:
    """What else might be given there; nothing where nothing is known."""
    if isinstance(value, (bool, np.bool_)):
        return [not value]
    if isinstance(value, (int, np.integer)):
        return [value - 1 if value > 0 else value + 1, 2 * value + 3]
    if isinstance(value, (float, complex, np.floating)):
        return [value * 0.3 or 1.0, 2 * value + 3]
    kind = _kind(value) if _is_array(value) else ""
    if kind == "b":
        return [_as_it_was(value, ~value)]
    if kind not in {"i", "u"} or 0 in value.shape:
        return []
    try:
        if all(size == 1 for size in value.shape):  # a number, of passes through a loop, say
            return [_as_it_was(value, value - 1 if (value > 0).all() else value + 1), _as_it_was(value, 2 * value + 3)]
        turned = value.flip(-1) if hasattr(value, "flip") else np.flip(value, -1)
        return [turned if (turned != value).any() else _as_it_was(value, value - 1 if (value > 0).all() else value + 1)]
    except RuntimeError:  # torch knows types with which it can do next to nothing
        return []


_RANGES = (30_000, 1_000, 100, 10, 3)
"""Ends of the ranges from which integers are drawn: those of the words of a language, first."""


def other_integers(batch: Batch) -> list[Batch]:
    """The batch with integers of a wider range in all arrays of two axes or more, from the widest range to the narrowest; none without such arrays.

    They are indices, most often: into the rows of a table that has as many as its model says, which raises where there are fewer. Those of fewer axes, and
    up to four of a sample, may be sizes (of an image, of a box), and are left.
    """
    given = [leaf for leaf in leaves(batch) if _has_indices(leaf)]
    return [_mapped(batch, partial(_drawn, end=end)) for end in _RANGES] if given else []


def _has_indices(value: Any) -> bool:
    several = _is_array(value) and (value.ndim > 2 or (value.ndim == 2 and value.shape[1] > 4))
    return bool(several and _kind(value) in {"i", "u"})


def _drawn(value: Any, end: int) -> Any:
    if not _has_indices(value):
        return value
    bits = value.dtype.itemsize * 8 - (_kind(value) == "i")
    drawn = np.random.default_rng(0).integers(0, min(end, 2**bits), tuple(value.shape))
    if isinstance(value, np.ndarray):
        return drawn.astype(value.dtype)
    return value.new_tensor(drawn.tolist())


def other_shapes(batch: Batch) -> list[list[Batch]]:
    """The batch with other sizes of the axes behind the first one, in some ways. Each has alternatives, of which the first that a model takes will do; many
    models take none.

    All axes behind the channels together, and axes of one size together: height and width, a sequence and its mask. They become longer by 32, so that what was
    square stays so and a multiple of 32 one. And they change by an odd number, the next such axis of an array by another, so that neither does: code that pads
    to a multiple shows only then. The odd change makes long axes shorter: that costs less, and ``max(n, 7)`` shows in one direction, ``min(n, 7)`` in the
    other. A model that does not take the one (a table of positions has its length) may take the other.
    """
    given = [leaf for leaf in leaves(batch) if _is_array(leaf)]
    sizes = list(dict.fromkeys(size for leaf in given for size in leaf.shape[1:] if size))
    groups = [*({size} for size in sizes[:MOST]), *([set(sizes[MOST:])] if sizes[MOST:] else [])]
    ways: list[Callable[[Any], list[int]]] = [
        lambda value: list(range(2, value.ndim)),
        *(partial(_axes_of, sizes=group) for group in groups),
    ]
    found: dict[_Shapes, list[Batch]] = {}
    for axes in ways:
        for changes in (_BY_32, _BY_AN_ODD_NUMBER):
            others = [_mapped(batch, partial(_of_other_size, axes=axes, change=change)) for change in changes]
            by_shape = {_shapes(other): other for other in others if _shapes(other) != _shapes(batch)}
            if by_shape:
                found.setdefault(next(iter(by_shape)), list(by_shape.values()))
    return list(found.values())


_Shapes = tuple[tuple[int, ...], ...]


def _shapes(batch: Batch) -> _Shapes:
    return tuple(tuple(leaf.shape) for leaf in leaves(batch) if _is_array(leaf))


_BY_32: tuple[Callable[[int, int], int], ...] = (
    lambda size, count: size + 32,
    lambda size, count: size - 32 if size >= LONG else size,
)
_BY_AN_ODD_NUMBER: tuple[Callable[[int, int], int], ...] = (
    lambda size, count: size - (31, 29)[count] if size >= LONG else size + (1, 3)[count],
    lambda size, count: size + (1, 3)[count] if size >= LONG else size - (1, 3)[count] if size > 4 else size,
)
"""The new size of an axis, from the old one and its count among the axes of an array that change, at most 1."""


def _axes_of(value: Any, sizes: set[int]) -> list[int]:
    return [axis for axis in range(1, value.ndim) if value.shape[axis] in sizes]


def _of_other_size(value: Any, axes: Callable[[Any], list[int]], change: Callable[[int, int], int]) -> Any:
    """Longer along some axes, repeated from the start, or shorter."""
    if not _is_array(value):
        return value
    for count, axis in enumerate(axes(value)):
        size = value.shape[axis]
        new = change(size, min(count, 1))
        if size and new != size:
            index = slice(new) if new < size else [i % size for i in range(new)]
            value = value[(slice(None),) * axis + (index,)]
    return value


def _is_array(value: Any) -> bool:
    """A dense array or tensor of numbers; numpy's single numbers are numbers."""
    if isinstance(value, np.generic):
        return False
    dense = str(getattr(value, "layout", "torch.strided")) == "torch.strided" and not getattr(value, "is_nested", False)
    return dense and hasattr(value, "dtype") and hasattr(value, "ndim") and _kind(value) in {"f", "c", "i", "u", "b"}


def _kind(value: Any) -> str:
    """numpy's letter for the type of an array or a tensor; none for what is not of numbers."""
    name = str(value.dtype).removeprefix("torch.")
    return next((kind for start, kind in _KINDS.items() if name.startswith(start)), "")


def leaves(batch: Batch) -> list[Any]:
    """What the inputs consist of, in order."""
    found: list[Any] = []
    _mapped(batch, lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
    return found


def _mapped(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return rebuilt(value, {key: walk(inner) for key, inner in value.items()})
        if type(value) in {list, tuple}:
            return type(value)(walk(inner) for inner in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(walk, value))
        if is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: walk(getattr(value, f.name)) for f in fields(value) if f.init}
            return replace(value, **parts)
        return change(value)

    args = tuple(walk(value) for value in batch.args)
    return replace(batch, args=args, kwargs={name: walk(value) for name, value in batch.kwargs.items()})


def rebuilt(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the same class with other values, where the class is one that can be copied and written to; else a plain one."""
    if type(value) is dict:
        return items
    try:
        other: Any = copy.copy(value)
        for key, item in items.items():
            other[key] = item
    except Exception:  # of the user's own, and perhaps not made for that
        return items
    return other  # type: ignore[no-any-return]


def resized(batch: Batch, size: int) -> Batch:
    """A batch of another size from the samples of a batch, repeated from the start where more are asked for.

    Resized are arrays and tensors whose first axis is the batch, labels, and lists with one entry per sample; containers
    are looked into, and everything else is passed on.

    Args:
        batch: at least one sample.
        size: samples in the result.
    """
    samples = [i % batch.size for i in range(size)]

    def resize(value: Any) -> Any:
        if getattr(value, "ndim", 0) and len(value) == batch.size:
            return value[samples]
        if isinstance(value, Mapping):
            return rebuilt(value, {key: resize(inner) for key, inner in value.items()})
        if isinstance(value, (list, tuple)):
            resized = [resize(inner) for inner in value]
            untouched = all(new is old for new, old in zip(resized, value, strict=True))
            if isinstance(value, list) and untouched and len(value) == batch.size:
                return [value[i] for i in samples]
            return type(value)(resized) if type(value) in (list, tuple) else value
        return value

    labels = None if batch.labels is None else np.asarray(batch.labels)[samples]
    kwargs = {name: resize(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(resize(value) for value in batch.args), kwargs=kwargs, labels=labels)
