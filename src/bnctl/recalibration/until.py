"""How many batches are enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import TypeVar

from bnctl.data.batches import Batches, CountedBatches, first_of
from bnctl.errors import UsageError
from bnctl.recalibration.method import NoSamplesError

T = TypeVar("T")

SIZED = 3
"""Batches that are looked at for their size."""

PILOT_SAMPLES = 64
"""So many samples, at least, say how many are needed."""

MOST_GROWTH = 16.0
"""From one run to the next; also where the error is no number."""


def check_tolerance(tolerance: float | None) -> None:
    """Refuse what no standard error can be.

    Raises:
        UsageError: it is not positive, or infinite, or no number.
    """
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < math.inf
    ):
        raise UsageError(f"the tolerance of the means is {tolerance}", hint="it is a positive number, such as 0.01")


def pilot(batches: Batches) -> int:
    """Number of batches of the first run, from the sizes of the first few: the very first may be smaller, or lack a sample that is held out.

    Raises:
        DataError: there is no batch.
    """
    sizes = [batch.size for _, batch in islice(batches.every(0, 1), SIZED)]
    if not sizes:
        first_of(batches)  # which says so
    return max(2, math.ceil(PILOT_SAMPLES * len(sizes) / sum(sizes)))


def part(batches: Batches, count: int | None) -> tuple[int, int | None]:
    """The stride and the limit that leave so many batches, at least: evenly spaced ones, since data are often sorted; of data of unknown length, the first
    ones. None: all.
    """
    if not isinstance(batches, CountedBatches):
        return 1, count
    return (1 if count is None else max(1, len(batches) // count)), None


def run_until(
    tolerance: float,
    count: int | None,
    once: Callable[[int | None], T],
    error_of: Callable[[T], float],
    all_seen: Callable[[], bool],
) -> tuple[T, bool]:
    """Run on more and more batches until the means are known well enough, and whether they are.

    A standard error falls with the root of the number of samples: after a run with the error e, the next one has ``1.1 (e/tolerance)**2`` times as many, at
    most 16 times; and twice as many where all were left out.

    Args:
        tolerance: of the largest standard error of a mean, in standard deviations.
        count: batches of the first run; None for all.
        once: a run on so many batches, at least; None for all.
        error_of: the error of a run.
        all_seen: whether the last run left no batch.

    Raises:
        NoSamplesError: every batch was left out.
    """
    while True:
        try:
            found = once(count)
        except NoSamplesError:
            if count is None or all_seen():
                raise
            count *= 2
            continue
        error = error_of(found)
        if error <= tolerance or count is None or all_seen():
            return found, error <= tolerance
        growth = (error / tolerance) ** 2 * 1.1
        count = max(count + 1, math.ceil(count * (growth if growth < MOST_GROWTH else MOST_GROWTH)))
