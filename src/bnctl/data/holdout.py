"""Some of the samples are held out: they judge what was made from the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bnctl.data.batches import Batch, Batches
from bnctl.errors import UsageError


def hold_out(batches: Batches, one_in: int) -> tuple[Batches, Batches]:
    """Split data into samples to work with and samples to judge by.

    Of every `one_in` samples in a row one is held out, drawn at random, but always the same, whatever the batch size: data may be sorted by class, or in
    turns. Each part can be read again and again, and counts its own samples from 0. Batches keep their numbers; where nothing is left of one, its number
    is missing.

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
            chosen = np.flatnonzero((numbers % one_in == _position(numbers // one_in, one_in)) == held_out)
            if len(chosen):
                rows, rest = divmod(batch.start, one_in)
                before = rows + int(
                    _position(np.array([rows]), one_in)[0] < rest
                )  # held-out samples in front of this batch
                yield index, replace(batch.rows(chosen), start=before if held_out else batch.start - before)

    return replace(batches, read=read)


def _position(row: NDArray[np.int64], one_in: int) -> NDArray[np.int64]:
    """Which of the `one_in` samples in a row is held out: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), which scatters neighbours."""
    with np.errstate(over="ignore"):
        z = row.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z % np.uint64(one_in)).astype(np.int64)
