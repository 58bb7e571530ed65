"""Some of the samples are held out: they judge what was made from the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bnctl.data.batches import Batch, Batches
from bnctl.errors import UsageError


def hold_out(batches: Batches, one_in: int) -> tuple[Batches, Batches]:
    """Split data into samples to work with and samples to judge by.

    Sample i of the data is held out if ``i % one_in == one_in - 1``, whatever the batch size. Each part can be read again and again, and counts
    its own samples from 0. Batches keep their numbers; where nothing is left of one, its number is missing. With fewer than `one_in` samples,
    none is held out.

    Args:
        batches: the data.
        one_in: at least 2.

    Returns:
        The samples to work with, and the held-out ones.

    Raises:
        UsageError: `one_in` is less than 2.
    """
    if one_in < 2:
        raise UsageError(f"one sample in {one_in} cannot be held out", hint="one in 2 or more, for instance 5")
    return _part(batches, one_in, held_out=False), _part(batches, one_in, held_out=True)


def _part(batches: Batches, one_in: int, *, held_out: bool) -> Batches:
    def read(first: int, step: int) -> Iterator[tuple[int, Batch]]:
        for index, batch in batches.every(first, step):
            numbers = np.arange(batch.start, batch.start + batch.size)
            chosen = np.flatnonzero((numbers % one_in == one_in - 1) == held_out)
            if len(chosen):
                before = batch.start // one_in  # held-out samples in front of this batch
                yield index, replace(batch.rows(chosen), start=before if held_out else batch.start - before)

    return Batches(read)
