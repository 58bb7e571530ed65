"""One recalibration: as many batches as it takes, in the schedule that memory allows, from the start or from where another one stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from bnctl.engines.torch.recalibration.lockstep import lockstep
from bnctl.engines.torch.recalibration.memory import DEFAULT_SHARE, available_bytes
from bnctl.engines.torch.recalibration.schedules import (
    Round,
    Settled,
    measure,
    pass_per_site,
    pass_with_own_batches,
    settle,
    solve,
)
from bnctl.engines.torch.recalibration.visits import Feed, Written
from bnctl.engines.torch.recalibration.workbench import Workbench
from bnctl.errors import ModelError
from bnctl.recalibration.book import Account, Book
from bnctl.recalibration.estimate import PROBE, produced
from bnctl.recalibration.method import Method, without_sites
from bnctl.recalibration.partial import Partial, State
from bnctl.recalibration.seen import Seen, largest_error
from bnctl.recalibration.until import pilot, run_until
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.recalibration.estimate import Statistics

MAX_STRANDS = 512
"""Most batches that are run in lockstep: each is a thread, and systems limit their number."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Found:
    """Accounts of all sites, what the new statistics produce in inference, and the sites that did not settle."""

    book: Book
    produced: dict[str, Statistics | None]
    moving: set[str]

    def standard_error(self) -> float:
        """The largest of all channels' means, in standard deviations."""
        return largest_error(account.seen for account in self.book.accounts.values())


@dataclass(eq=False)
class Run:
    """How statistics are taken, and with what.

    Args:
        method: "exact", "batch" or "ema".
        selection: which sites.
        bench: runs the working copy over the data.
        memory_bytes: what paused forwards may hold; None: half of what is available.
        partial: where to keep what is known so far.
    """

    method: Method
    selection: Selection
    bench: Workbench
    memory_bytes: int | None
    partial: Partial
    _count: int | None = None

    def until(self, tolerance: float | None, *, resume: bool) -> tuple[Found, bool | None]:
        """Recalibrate on as many batches as it takes, and whether they were enough."""
        bench = self.bench
        state = bench.workers.share(
            self.partial.read() if resume and not bench.workers.rank else None, lambda found: found[0]
        )
        count = None if tolerance is None else pilot(bench.batches)
        if state is not None:
            bench.random_state = torch.frombuffer(bytearray(state.random_state), dtype=torch.uint8)
            count = state.count

        def once(count: int | None) -> Found:
            nonlocal state
            begun, state = state, None
            self._count = count
            while True:
                bench.start_over(count)
                try:
                    return self._once(begun)
                except Written as found:
                    if bench.workers.size > 1:
                        raise _written_now_and_then() from None
                    bench.keep_apart({found.place})

        def all_seen() -> bool:
            return bench.stride == 1 and not bench.workers.share(bench.cut, any)

        if tolerance is None:
            return once(None), None
        return run_until(tolerance, count, once, Found.standard_error, all_seen)

    def _once(self, state: State | None) -> Found:
        if self.method == "exact":
            return self._exact(state)
        bench = self.bench
        book, probe = Book(), Book()
        if state is not None:
            book.accounts |= state.accounts
            probe.accounts |= state.probe
            bench.skipped |= state.skipped

        def enter(first: int, samples: int) -> None:
            book.enter(bench.workers)
            probe.enter(bench.workers)
            if bench.skip_bad:
                bench.skipped |= bench.workers.share(bench.skipped, lambda of_workers: set().union(*of_workers))
            self._keep(book.accounts, probe.accounts, first, samples)

        pass_with_own_batches(
            bench, book, probe, enter, *((0, 0) if state is None else (state.next_batch, state.samples))
        )
        _check_sites(bench, self.selection)
        for account in with_values(book):
            bench.store(account.site, account.average if self.method == "ema" else bench.statistics(account))
        measured = measure(bench, PROBE)

        def seen(book: Book, name: str) -> Seen | None:
            return book.accounts[name].seen if name in book.accounts else None

        names = [account.site.name for account in with_values(book)]
        found = {n: produced(book.accounts[n].seen, seen(probe, n), seen(measured, n)) for n in names}
        return Found(book, found, set())

    def _exact(self, state: State | None) -> Found:
        bench, settled = self.bench, Settled()
        round_ = self._round()
        if state is not None:
            bench.samples = state.samples
        bench.keep = lambda: self._keep(settled, {}, 0, bench.samples or 0)
        for account in () if state is None else state.accounts.values():
            settle(bench, account, settled)
        book, moving = solve(bench, round_, settled)
        return Found(book, {a.site.name: a.seen.values.statistics() for a in with_values(book)}, moving)

    def _round(self) -> Round:
        """Lockstep where the paused forwards of every worker fit into its memory, else one pass per site."""
        bench = self.bench
        budget = self.memory_bytes
        if budget is None:
            beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if bench.workers.size > 1 else 1
            budget = int(available_bytes(bench.device) * DEFAULT_SHARE / beside)
        feeds: list[Feed] = []
        held, samples, fits = 0.0, 0, True
        for feed in bench.feeds():
            per_sample = bench.learn(feed)
            samples += feed.size
            held = per_sample * samples + bench.own_bytes * (len(feeds) + 1)
            fits = held <= budget and len(feeds) < MAX_STRANDS and not bench.one_by_one
            if not fits:
                break
            feeds.append(feed)
        if bench.workers.share(fits, all):
            bench.passed(bench.workers.share(samples, sum))
        _check_sites(bench, self.selection)
        if bench.samples is not None:
            return partial(lockstep, bench, feeds)
        _log.info(
            "one pass per layer: %d batches would hold %.0f MB, of %.0f",
            len(feeds) + 1,
            held / 1e6,
            budget / 1e6,
        )
        return partial(pass_per_site, bench)

    def _keep(
        self, accounts: Mapping[str, Account], probe: Mapping[str, Account], next_batch: int, samples: int
    ) -> None:
        if self.bench.workers.rank == 0:
            random_state = self.bench.random_state.numpy().tobytes()
            self.partial.keep(
                State(
                    random_state,
                    dict(accounts),
                    dict(probe),
                    next_batch,
                    samples,
                    self._count,
                    frozenset(self.bench.skipped),
                )
            )


def _check_sites(bench: Workbench, selection: Selection) -> None:
    """Refuse a model without sites, and globs that name none. Every worker calls this in step."""
    names = bench.workers.share(
        bench.sites.names(), lambda of_workers: [name for names in of_workers for name in names]
    )
    if not names:
        raise without_sites(type(bench.model).__name__)
    selection.check(names)


def _written_now_and_then() -> ModelError:
    return ModelError(
        "the model writes to a buffer or parameter of its own, and not in every forward pass: workers cannot agree on who begins anew",
        hint="recalibrate in one process",
    )


def with_values(book: Book) -> list[Account]:
    """The accounts of all sites that saw a value, in the order of their first calls."""
    return [account for account in book.in_order() if account.count]
