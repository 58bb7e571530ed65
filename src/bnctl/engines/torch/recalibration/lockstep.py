"""All batches at once: each forward waits at each site for the others, and every activation is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial

import torch

from bnctl.engines.torch.recalibration.activations import chunk_of
from bnctl.engines.torch.recalibration.schedules import Settled, settle
from bnctl.engines.torch.recalibration.strand import Strand
from bnctl.engines.torch.recalibration.visits import Feed, Visit, look
from bnctl.engines.torch.recalibration.workbench import Workbench
from bnctl.recalibration.book import Book

AT_ONCE = 1 << 20
"""An activation of at least so many values is looked at while it is in the cache; smaller ones together, when all batches have come: to go from the model's
code to that of moments and back costs more than their values."""


def lockstep(bench: Workbench, feeds: list[Feed], fixed: Collection[str], settled: Settled) -> Book:
    """One round in which every forward is a strand that waits at each site that is not settled.

    When all wait or have ended, the site at which the lowest batch waits is settled from everything that arrived there, and those who waited for it go
    on. So there is always somebody who can go on, whatever way the batches take; a batch that comes to a site later finds it settled, and
    :func:`~bnctl.engines.torch.recalibration.schedules.solve` sees to it. Neither the number of workers nor that of hands makes a difference.
    """
    book, later = Book(), list[Visit]()
    known = {*fixed, *settled}
    strands = [Strand(partial(_forward, bench, feed, book, known, later), f"batch {feed.index}") for feed in feeds]
    ready, waiting = list(enumerate(strands)), dict[int, str]()
    numbers = {strand: number for number, strand in ready}
    try:
        for _ in bench.crew.run(strands):
            pass  # all threads are there
        while True:
            for strand in bench.crew.run(strand for _, strand in ready):
                if strand.value is not None:
                    waiting[numbers[strand]] = strand.value
            for _ in bench.crew.each(partial(_look, book), _in_pieces(later)):
                pass  # all are noted
            later.clear()
            lowest = min(((feeds[number].index, name) for number, name in waiting.items()), default=None)
            first = bench.workers.share(lowest, lambda found: min((f for f in found if f is not None), default=None))
            if first is None:
                break
            _, name = first
            known.add(name)
            book.enter(bench.workers, name)
            settle(bench, book.accounts[name], settled)
            ready = sorted((number, strands[number]) for number, at in waiting.items() if at == name)
            for number, _ in ready:
                del waiting[number]
    finally:
        for strand in strands:
            strand.close()
    book.enter(bench.workers)
    return book


def _forward(
    bench: Workbench,
    feed: Feed,
    book: Book,
    known: Collection[str],
    later: list[Visit],
    pause: Callable[[str], None],
) -> None:
    def arrive(visit: Visit) -> None:
        waits = visit.site.name not in known
        if waits and visit.call.x.numel() < AT_ONCE:
            later.append(visit)
        else:
            _look(book, [visit])
        if waits:
            pause(visit.site.name)

    torch.get_num_threads()  # a thread's first look throws away what torch has prepared for its convolutions: before there is any
    pause("")
    bench.run(feed, arrive)


def _look(book: Book, visits: Sequence[Visit]) -> None:
    for visit, seen in zip(visits, look(visits), strict=True):
        book.note(visit.site, visit.when(), seen)


def _in_pieces(visits: Iterable[Visit]) -> Iterator[list[Visit]]:
    """Calls of one kind, as many as are widened at a time."""
    kinds: dict[object, list[Visit]] = {}
    for visit in sorted(visits, key=Visit.when):
        kinds.setdefault(visit.kind(), []).append(visit)
    for alike in kinds.values():
        x = alike[0].call.x
        size = max(1, chunk_of(x) // max(1, x.numel()))
        yield from (alike[first : first + size] for first in range(0, len(alike), size))
