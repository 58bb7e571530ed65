"""A batch as other batches: of other sizes, shapes and values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bnctl.data.batches import Batch

MOST = 6
"""Sizes, and choices, that are varied in turn."""


_KINDS = {"float": "f", "bfloat": "f", "complex": "c", "int": "i", "uint": "u", "bool": "b"}


def other_batch_sizes(batch: Batch) -> list[Batch]:
    """The samples of a batch again as batches of other sizes: one and three, as far as the batch has another size.

    They find a batch size that surgery or export has baked into the model. See :func:`resized` for what is resized.
    """
    return [resized(batch, size) for size in (1, 3) if batch.size and size != batch.size]


def other_values(batch: Batch) -> list[Batch]:
    """The batch with other float values: turned around, and larger and brighter.

    They find numbers of the example that surgery has baked in, and paths that the example did not take.
    """
    ways = ((-1.7, 0.0), (1.7, 3.0))
    return [
        _mapped(batch, lambda v, k=k, c=c: v * k + c if _is_array(v) and _kind(v) == "f" else v)  # type: ignore[misc]
        for k, c in ways
    ]


def other_choices(batch: Batch, *, arrays: bool = True) -> list[Batch]:
    """The batch with one choice made otherwise, for each that there is: a flag or a number of Python's, a mask, integers (in another order: they may be
    indices).

    Args:
        batch: as given.
        arrays: vary masks and integers in arrays, too, and not only what Python sees as such.
    """
    found: list[Batch] = []
    for number, leaf in enumerate(leaves(batch)):
        if (arrays or not _is_array(leaf)) and _other_choice(leaf) is not leaf:
            numbers = itertools.count()
            found.append(
                _mapped(batch, lambda v, n=number, numbers=numbers: _other_choice(v) if next(numbers) == n else v)  # type: ignore[misc]
            )
    return found[:MOST]


def _other_choice(value: Any) -> Any:
    """Something else that might be given there; the value itself where nothing is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value * 1.7 or 1.0
    if isinstance(value, int):
        return value - 1 if value > 0 else value + 1
    kind = _kind(value) if _is_array(value) else ""
    if kind == "b":
        return ~value
    if kind not in {"i", "u"} or 0 in value.shape:
        return value
    turned = value if not value.ndim else value.flip(-1) if hasattr(value, "flip") else np.flip(value, -1)
    if (turned != value).any():
        return turned
    return value - 1 if (value > 0).all() else value + 1


def other_shapes(batch: Batch) -> list[Batch]:
    """The batch with longer axes behind the first one; many models do not take them. Axes of one size grow together: height and width, a sequence and its mask.

    By 32, so that what was square stays so and a multiple of 32 one; by 1, and the next such axis of an array by 3, so that neither does: code that pads to a
    multiple shows only then.
    """
    sizes = dict.fromkeys(size for leaf in leaves(batch) if _is_array(leaf) for size in leaf.shape[1:])
    return [
        _mapped(batch, partial(_longer, size=size, more=more))
        for size in list(sizes)[:MOST]
        if size
        for more in ((32, 32), (1, 3))
    ]


def _longer(value: Any, size: int, more: tuple[int, int]) -> Any:
    """Repeat from the start along the axes of a size."""
    if not _is_array(value):
        return value
    for count, axis in enumerate(a for a in range(1, value.ndim) if value.shape[a] == size):
        index = [i % size for i in range(size + more[min(count, 1)])]
        value = value[(slice(None),) * axis + (index,)]
    return value


def _is_array(value: Any) -> bool:
    """A dense array or tensor of numbers."""
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
            return {key: walk(inner) for key, inner in value.items()}
        if type(value) in {list, tuple}:
            return type(value)(walk(inner) for inner in value)
        return change(value)

    args = tuple(walk(value) for value in batch.args)
    return replace(batch, args=args, kwargs={name: walk(value) for name, value in batch.kwargs.items()})


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
            return {key: resize(inner) for key, inner in value.items()}
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
