"""A batch as other batches: of other sizes, shapes and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bnctl.data.batches import Batch


def other_batch_sizes(batch: Batch) -> list[Batch]:
    """The samples of a batch again as batches of other sizes: one and three, as far as the batch has another size.

    They find a batch size that surgery or export has baked into the model. See :func:`resized` for what is resized.
    """
    return [resized(batch, size) for size in (1, 3) if batch.size and size != batch.size]


def other_values(batch: Batch) -> list[Batch]:
    """The batch with other float values: turned around, and larger and brighter.

    They find numbers of the example that surgery has baked in, and paths that the example did not take.
    """
    return [
        _mapped(batch, partial(_scaled, factor=factor, offset=offset)) for factor, offset in ((-1.7, 0.0), (1.7, 3.0))
    ]


def _scaled(value: Any, factor: float, offset: float) -> Any:
    return value * factor + offset


def other_shapes(batch: Batch) -> list[Batch]:
    """The batch with longer axes behind the channels, of inputs with three axes or more; many models do not take them.

    By 32, so that what was square stays so and a multiple of 32 one; by 1 and 3, so that neither does: code that pads to a multiple shows only then.
    """
    ways = (((2, 3, 4), (32, 32)), ((2, 3, 4), (1, 3)), ((1,), (32, 32)))
    given = [_mapped(batch, partial(_longer, axes=axes, more=more)) for axes, more in ways]
    return [b for b in given if _sizes(b) != _sizes(batch)]


def _sizes(batch: Batch) -> list[tuple[int, ...]]:
    """The shapes of all inputs, in order."""
    found: list[tuple[int, ...]] = []

    def note(value: Any) -> Any:
        found.append(tuple(value.shape))
        return value

    _mapped(batch, note)
    return found


def _longer(value: Any, axes: tuple[int, ...], more: tuple[int, int]) -> Any:
    """Repeat from the start along some axes; even axes and odd ones may grow by different numbers."""
    if value.ndim < 3 or (axes == (1,) and value.ndim != 3):
        return value
    for axis in (a for a in axes if a < value.ndim):
        size = value.shape[axis]
        index = [i % size for i in range(size + more[axis % 2])]
        value = value[(slice(None),) * axis + (index,)]
    return value


def _mapped(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        if type(value) in {list, tuple}:
            return type(value)(walk(inner) for inner in value)
        kind = getattr(getattr(value, "dtype", None), "is_floating_point", None)
        if kind is None:
            kind = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return change(value) if kind and getattr(value, "ndim", 0) else value

    kwargs = {name: walk(value) for name, value in batch.kwargs.items()}
    return replace(batch, args=tuple(walk(value) for value in batch.args), kwargs=kwargs)


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
