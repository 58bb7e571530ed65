"""Work that threads do ahead of the one who reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Tag = TypeVar("Tag")
Item = TypeVar("Item")
Result = TypeVar("Result")

THREAD_NAME = "bnctl-data"


def map_groups(
    call: Callable[[Item], Result], groups: Iterable[tuple[Tag, Sequence[Item]]], *, workers: int
) -> Iterator[tuple[Tag, list[Result]]]:
    """`call` of each item, group by group, in order; `workers` threads go on with the next groups while one is in use (0: no threads).

    So many groups wait that there are two items per thread, and at least one group; an empty group counts as an item. The threads end with
    the iterator, also where it is closed early.
    Threads suffice where `call` releases the interpreter's lock, as decoders of images do.

    Raises:
        Whatever `call` raises, when the result is due.
    """
    if not workers:
        for tag, group in groups:
            yield tag, [call(item) for item in group]
        return
    waiting: deque[tuple[Tag, list[Future[Result]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=THREAD_NAME)
    try:
        for tag, group in groups:
            waiting.append((tag, [pool.submit(call, item) for item in group]))
            while sum(max(len(later), 1) for _, later in islice(waiting, 1, None)) >= 2 * workers:
                yield _due(waiting)
        while waiting:
            yield _due(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _due(waiting: deque[tuple[Tag, list[Future[Result]]]]) -> tuple[Tag, list[Result]]:
    tag, results = waiting.popleft()
    return tag, [result.result() for result in results]
