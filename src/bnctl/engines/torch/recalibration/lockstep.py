"""All batches at once: each forward waits at each site for the others, and every activation is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch

from bnctl.engines.torch.recalibration.schedules import Settled, settle
from bnctl.engines.torch.recalibration.strand import Strand
from bnctl.engines.torch.recalibration.workbench import Feed, Visit, Workbench
from bnctl.recalibration.book import Book


def lockstep(bench: Workbench, feeds: list[Feed], fixed: Collection[str], settled: Settled) -> Book:
    """One round in which every forward is a strand that waits at each site that is not settled.

    When all wait or have ended, the site at which the lowest batch waits is settled from everything that arrived there, and those who waited for it go
    on. So there is always somebody who can go on, whatever way the batches take; a batch that comes to a site later finds it settled, and
    :func:`~bnctl.engines.torch.recalibration.schedules.solve` sees to it. Neither the number of workers nor that of hands makes a difference.
    """
    book = Book()
    known = {*fixed, *settled}
    strands = [Strand(partial(_forward, bench, feed, book, known), f"batch {feed.index}") for feed in feeds]
    ready, waiting = list(enumerate(strands)), dict[int, str]()
    numbers = {strand: number for number, strand in ready}
    try:
        for _ in bench.crew.run(strands):
            pass  # all threads are there
        while True:
            for strand in bench.crew.run(strand for _, strand in ready):
                if strand.value is not None:
                    waiting[numbers[strand]] = strand.value
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


def _forward(bench: Workbench, feed: Feed, book: Book, known: Collection[str], pause: Callable[[str], None]) -> None:
    def arrive(visit: Visit) -> None:
        book.note(visit.site, (feed.index, visit.step), visit.look())
        if visit.site.name not in known:
            pause(visit.site.name)

    torch.get_num_threads()  # a thread's first look throws away what torch has prepared for its convolutions: before there is any
    pause("")
    bench.run(feed, arrive)
