"""In which order batches and layers take turns: one pass, or one pass per layer; and how a fixed point is found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from bnctl.engines.torch.recalibration.visits import Feed, Visit
from bnctl.engines.torch.recalibration.workbench import Workbench
from bnctl.recalibration.book import Account, Book
from bnctl.recalibration.estimate import PROBE
from bnctl.recalibration.method import one_value
from bnctl.recalibration.seen import Seen

Settled = dict[str, Account]
"""Sites that received their statistics in this round, by name, and what these were made of."""

Round = Callable[[Collection[str], Settled], Book]
"""Takes the names of the sites to leave as they are, fills in those that it settled, and returns what all saw."""

STRIDE = 8
"""How many batches a worker goes through before the workers put together what they noted."""


def each_batch(
    bench: Workbench,
    what: str,
    handle: Callable[[Feed], None],
    enter: Callable[[int, int], None],
    first: int = 0,
    step: int = 1,
) -> int:
    """One pass of all workers in step.

    Args:
        bench: with the batches.
        what: is done, for the progress.
        handle: called with each batch of this worker, in the crew's threads.
        enter: called by all workers every `STRIDE` batches of each, with the number of the first batch that is still to come,
            and that of samples so far.
        first: number of the batch to begin with.
        step: to the next.

    Returns:
        How many samples there were.
    """
    feeds, done, samples = bench.feeds(first, step), 0, 0
    ahead = next(feeds, None)
    if ahead is not None:
        bench.learn(ahead)

    def below(end: int) -> Iterator[Feed]:
        nonlocal ahead
        while ahead is not None and ahead.index < end:
            yield ahead
            ahead = next(feeds, None)

    while bench.workers.share(ahead is not None, any):
        sizes: list[int] = []
        first += step * bench.stride * STRIDE * bench.workers.size
        for feed in bench.crew.each(handle, below(first)):
            sizes.append(feed.size)
            bench.progress(what, done + len(sizes), bench.total(step))
        done += bench.workers.share(len(sizes), sum)
        samples += bench.workers.share(sum(sizes), sum)
        enter(first, samples)
    return samples


def measure(bench: Workbench, step: int = 1) -> Book:
    """What the sites see under the statistics in force, from one batch of every `step`."""
    book = Book()

    def look(visit: Visit) -> None:
        book.note(visit.site, visit.when(), visit.look())

    samples = each_batch(
        bench, "measure", partial(bench.run, on_site=look), lambda *_: book.enter(bench.workers), step=step
    )
    if step == 1:
        bench.passed(samples)
    return book


def pass_with_own_batches(
    bench: Workbench, book: Book, probe: Book, enter: Callable[[int, int], None], first: int = 0, samples: int = 0
) -> None:
    """One pass in which every site normalises with the statistics of the very call.

    Args:
        bench: with the batches.
        book: of all batches.
        probe: of one batch of every ``PROBE``.
        enter: see :func:`each_batch`.
        first: number of the batch to begin with.
        samples: how many came before it.

    Raises:
        DataError: a call has one value per channel, from which normalisation would leave nothing.
    """

    def normalise(visit: Visit) -> Any:
        seen, index = visit.look(), visit.feed.index
        for one in (book, probe) if index % (PROBE * bench.stride) == 0 else (book,):
            one.note(visit.site, visit.when(), seen)
        return _normalised(visit, seen)

    def enter_all(next_batch: int, new: int) -> None:
        enter(next_batch, samples + new)

    new = each_batch(bench, "gather", partial(bench.run, on_site=normalise), enter_all, first=first)
    bench.passed(samples + new)


def _normalised(visit: Visit, seen: Seen) -> Any:
    """What the layer returns in training. The moments are known already: the operator is spared from taking them again."""
    if seen.values.count == 1:
        raise one_value(visit.feed.index, visit.site.name)
    if not seen.values.count:
        return None
    if visit.call.per_instance:
        return visit.call.with_own_statistics()
    mean, var = map(torch.from_numpy, seen.values.statistics())
    return visit.call.with_statistics(mean, var)


def pass_per_site(bench: Workbench, fixed: Collection[str], settled: Settled) -> Book:
    """One pass for each site: forwards end at the first site that is not settled yet, and the one that was reached first is
    settled. Needs no more memory than one forward; costs about half a pass per site, and two.
    """
    while (account := _stop_at_first(bench, {*fixed, *settled})) is not None:
        settle(bench, account, settled)
    return measure(bench)


class _Reached(BaseException):
    """Ends a forward at a site; not an Exception, so that user code does not swallow it."""


def _stop_at_first(bench: Workbench, known: Collection[str]) -> Account | None:
    reached = Book()

    def stop(visit: Visit) -> None:
        if visit.site.name not in known:
            reached.note(visit.site, visit.when(), visit.look())
            raise _Reached

    def handle(feed: Feed) -> None:
        with suppress(_Reached):
            bench.run(feed, stop)

    bench.passed(each_batch(bench, f"layer {len(known) + 1}", handle, lambda *_: reached.enter(bench.workers)))
    return next(iter(reached.in_order()), None)


def settle(bench: Workbench, account: Account, settled: Settled) -> None:
    """Give a site its statistics, unless all that came was empty."""
    if account.count:
        bench.store(account.site, bench.statistics(account))
    settled[account.site.name] = account
    bench.keep()
    bench.progress("settle", len(settled), len(bench.sites.names()))


def solve(
    bench: Workbench, round_: Round, settled: Settled, *, tolerance: float = 1e-6, max_rounds: int = 30
) -> tuple[Book, set[str]]:
    """Statistics that agree with what they produce.

    A site that all batches call once is final after one round. One that is called again after it was settled depends on
    itself: in further rounds it keeps the statistics that all its calls of the round before produced, while the others are settled
    anew. A chain of k such sites that do not feed themselves is exact after k + 1 rounds; otherwise this is a fixed-point iteration.

    Args:
        bench: holds the statistics.
        round_: one pass over the data, in some schedule.
        settled: what the first round finds settled already.
        tolerance: see :meth:`Workbench.agrees`.
        max_rounds: at most so many.

    Returns:
        What the last round saw under the statistics that are in force, and the sites that had not settled by then.
    """
    recurrent: set[str] = set()
    for number in range(1, max_rounds + 1):
        book = round_(recurrent, settled)
        recurrent |= {name for name, account in settled.items() if book.accounts[name].count > account.count}
        produced = {name: a for name, a in book.accounts.items() if name in recurrent and a.count}
        new = {name: bench.statistics(account) for name, account in produced.items()}
        moving = {
            name for name, statistics in new.items() if not bench.agrees(produced[name].site, statistics, tolerance)
        }
        if not moving or number == max_rounds:
            break
        bench.keep = lambda: None  # a run that is resumed begins with the first round
        for name, statistics in new.items():
            bench.store(produced[name].site, statistics)
        settled = {}
    return book, moving
