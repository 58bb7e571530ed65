"""Arrays in memory or on disk, cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnctl.data.batches import Batch


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Batches of arrays with a common first axis; the last batch may be smaller.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        labels: int64 (N,), or None.
        batch_size: samples per batch.
        transform: applied to each positional input of a batch.
    """

    args: tuple[NDArray[Any], ...]
    kwargs: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    batch_size: int
    transform: Callable[[NDArray[Any]], NDArray[Any]] | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.samples, self.batch_size):
            part = slice(start, start + self.batch_size)
            args = tuple(np.asarray(a[part]) for a in self.args)
            if self.transform is not None:
                args = tuple(self.transform(a) for a in args)
            kwargs = {name: np.asarray(a[part]) for name, a in self.kwargs.items()}
            yield Batch(args, kwargs, None if self.labels is None else self.labels[part])
