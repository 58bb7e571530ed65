"""Timing several functions in turns of random order, inside one process.

Measured one after the other, two copies of the same network differ "significantly" in a quarter of all runs, because
clocks, caches and neighbours drift. So each function gets many short turns, in an order that is drawn anew in each
round: drift hits all alike.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from statistics import median
from time import perf_counter_ns

Call = Callable[[], object]
Clock = Callable[[], int]

_MIN_WARMUP_CALLS = 3
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Schedule:
    """How long to measure, in nanoseconds.

    Attributes:
        block_ns: length of one turn; also of the warm-up.
        rounds: turns of each function, at most.
        budget_ns: time for all turns together; at least three rounds are taken.
    """

    block_ns: int
    rounds: int
    budget_ns: int


def time_in_turns(
    calls: Sequence[Call], schedule: Schedule, rng: random.Random, clock: Clock = perf_counter_ns
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Nanoseconds per function, per turn, per call.

    Every function is warmed first (first calls compile, allocate and read weights), which also tells how many calls
    fill a turn. The garbage collector is off while the clock runs.

    Args:
        calls: the functions.
        schedule: how long to measure.
        rng: for the order of turns.
        clock: monotonic, in nanoseconds.
    """
    with _collector_off():
        warm_ns = [_warm(call, schedule.block_ns, clock) for call in calls]
        repetitions = [max(1, ceil(schedule.block_ns / max(1, ns))) for ns in warm_ns]
        round_ns = sum(ns * n for ns, n in zip(warm_ns, repetitions, strict=True))
        affordable = int(schedule.budget_ns / max(1, round_ns))
        turns: list[list[tuple[int, ...]]] = [[] for _ in calls]
        for _ in range(max(_MIN_ROUNDS, min(schedule.rounds, affordable))):
            for i in rng.sample(range(len(calls)), len(calls)):
                turns[i].append(_turn(calls[i], repetitions[i], clock))
    return tuple(map(tuple, turns))


def typical_ns(turns: Sequence[Sequence[int]]) -> float:
    """The median over turns of the median call of each turn."""
    return median(median(turn) for turn in turns)


def _warm(call: Call, at_least_ns: int, clock: Clock) -> float:
    times: list[int] = []
    while len(times) < _MIN_WARMUP_CALLS or sum(times) < at_least_ns:
        times += _turn(call, 1, clock)
    return median(times[len(times) // 2 :])


def _turn(call: Call, repetitions: int, clock: Clock) -> tuple[int, ...]:
    times = []
    for _ in range(repetitions):
        start = clock()
        call()
        times.append(clock() - start)
        getattr(call, "renew", _nothing)()  # a model may have written into its inputs
    return tuple(times)


def _nothing() -> None:
    """There is nothing to be renewed."""


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
