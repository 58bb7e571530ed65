"""The samples of a batch as batches of other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bnctl.data.batches import Batch


def other_batch_sizes(batch: Batch) -> list[Batch]:
    """The samples of a batch again as batches of other sizes: one and three, as far as the batch has another size.

    They find a batch size that surgery or export has baked into the model. See :func:`resized` for what is resized.
    """
    return [resized(batch, size) for size in (1, 3) if batch.size and size != batch.size]


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
