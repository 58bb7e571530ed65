"""Samples without NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bnctl.data.batches import Batch, Batches
from bnctl.data.resize import leaves
from bnctl.errors import DataError
from bnctl.runtime.feeds import as_array


class NotFiniteError(DataError):
    """Samples hold NaN or infinity."""


def finite(batches: Batches, *, skip: bool) -> Batches:
    """The same batches, of which each is looked at when it is read.

    Args:
        batches: of samples that judge a result.
        skip: leave out a batch that holds NaN or infinity, instead of refusing it.

    Raises:
        NotFiniteError: such a batch comes, and is not to be left out.
    """

    def read(first: int, step: int) -> Iterator[tuple[int, Batch]]:
        for number, batch in batches.every(first, step):
            if _is_finite(batch):
                yield number, batch
            elif not skip:
                raise NotFiniteError(
                    f"batch {number} holds NaN or infinity, in a sample that is held out to judge the result",
                    hint="check the preprocessing, or leave such batches out with --on-bad-batch skip",
                )

    return replace(batches, read=read)


def _is_finite(batch: Batch) -> bool:
    arrays = (as_array(leaf) for leaf in leaves(batch) if hasattr(leaf, "dtype"))
    return all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
