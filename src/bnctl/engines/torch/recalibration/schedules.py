"""In which order batches and layers take turns: one pass, or one pass per layer; and how a fixed point is found.

Every schedule returns the moments of all sites' inputs, over all calls, under the statistics that were in force when each was called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any

from bnctl.engines.torch.recalibration.operators import NormCall
from bnctl.engines.torch.recalibration.sites import Site
from bnctl.engines.torch.recalibration.workbench import Feed, Tally, Workbench, gather
from bnctl.errors import DataError
from bnctl.numerics.moments import Moments

Settled = dict[Site, Moments]
"""Sites that received their statistics in this round, and the moments that these were made of."""

Round = Callable[[Collection[Site], Settled], Tally]
"""Takes the sites to leave as they are, fills in those that it settled, and returns what all saw."""


def measure(bench: Workbench) -> Tally:
    """One pass with the statistics in force."""
    tally = Tally()
    for feed in bench.feeds():
        bench.run(feed, partial(_look, tally, feed))
        bench.progress("measure", feed.index + 1, None)
    return tally


def pass_with_own_batches(bench: Workbench) -> Tally:
    """One pass in which every site normalises with the statistics of the very call.

    Raises:
        DataError: a call has one value per channel, from which normalisation would leave nothing.
    """
    tally = Tally()

    def normalise(feed: Feed, site: Site, call: NormCall) -> Any:
        count = gather(tally, feed, site, call).count
        if count == 1:
            raise DataError(
                f"batch {feed.index}: {site.name} sees one value per channel, which has no variance",
                hint="use the exact method, which pools all batches, or a larger batch size",
            )
        return call.with_own_statistics() if count else None

    for feed in bench.feeds():
        bench.run(feed, partial(normalise, feed))
        bench.progress("gather", feed.index + 1, None)
    return tally


def _look(tally: Tally, feed: Feed, site: Site, call: NormCall) -> None:
    gather(tally, feed, site, call)


def pass_per_site(bench: Workbench, fixed: Collection[Site], settled: Settled) -> Tally:
    """One pass for each site: forwards end at the first site that is not settled yet, and the one that was reached first is
    settled. Needs no more memory than one forward; costs about half a pass per site, and two.
    """
    while arrived := _stop_at_first(bench, {*fixed, *settled}):
        settle(bench, *arrived, settled)
    return measure(bench)


class _Reached(BaseException):
    """Ends a forward at a site; not an Exception, so that user code does not swallow it."""


def _stop_at_first(bench: Workbench, known: Collection[Site]) -> tuple[Site, Moments] | None:
    reached = Tally()

    def stop(feed: Feed, site: Site, call: NormCall) -> None:
        if site not in known:
            gather(reached, feed, site, call)
            raise _Reached

    for feed in bench.feeds():
        with suppress(_Reached):
            bench.run(feed, partial(stop, feed))
    return next(iter(reached.moments.items()), None)


def settle(bench: Workbench, site: Site, moments: Moments, settled: Settled) -> None:
    """Give a site its statistics, unless all that came was empty."""
    if moments.count:
        site.store(moments)
    settled[site] = moments
    bench.progress("settle", len(settled), None)


def solve(round_: Round, *, tolerance: float = 1e-6, max_rounds: int = 30) -> tuple[Tally, set[Site]]:
    """Statistics that agree with what they produce.

    A site that all batches call once is final after one round. One that is called again after it was settled depends on
    itself: in further rounds it keeps the statistics that all its calls of the round before produced, while the others are settled
    anew. A chain of k such sites that do not feed themselves is exact after k + 1 rounds; otherwise this is a fixed-point iteration.

    Args:
        round_: one pass over the data, in some schedule.
        tolerance: see :meth:`Site.agrees`.
        max_rounds: at most so many.

    Returns:
        What the last round saw under the statistics that are in force, and the sites that had not settled by then.
    """
    recurrent: set[Site] = set()
    for number in range(1, max_rounds + 1):
        settled: Settled = {}
        tally = round_(recurrent, settled)
        recurrent |= {site for site, moments in settled.items() if tally.moments[site].count > moments.count}
        produced = {site: moments for site, moments in tally.moments.items() if site in recurrent and moments.count}
        moving = {site for site, moments in produced.items() if not site.agrees(moments, tolerance)}
        if not moving or number == max_rounds:
            break
        for site, moments in produced.items():
            site.store(moments)
    return tally, moving
