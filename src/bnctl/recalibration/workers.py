"""Processes that share the work: each takes its batches, and what they saw is put together in one place, in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Workers(Protocol):
    """The processes of a run, seen from one of them.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def share(self, value: T, combine: Callable[[list[T]], R]) -> R:
        """Put together what every worker has: all call this in step, and all get ``combine([of worker 0, of worker 1, ...])``, computed once.

        Raises:
            WorkerError: another worker has failed, or is gone.
        """
        ...


class Alone:
    """One process that does everything."""

    rank = 0
    size = 1

    def share(self, value: T, combine: Callable[[list[T]], R]) -> R:
        """What `combine` makes of the one value."""
        return combine([value])
