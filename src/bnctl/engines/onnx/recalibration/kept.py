"""How far a run has come, in the form in which a file keeps it for another run."""

from __future__ import annotations

from collections.abc import Mapping

from bnctl.engines.onnx.recalibration.schedules import Account, Accounts, Progress
from bnctl.engines.onnx.recalibration.sites import Site
from bnctl.engines.onnx.recalibration.workbench import Workbench
from bnctl.recalibration import book, site
from bnctl.recalibration.partial import State


def as_state(bench: Workbench, progress: Progress, count: int | None) -> State:
    """What is known so far.

    Args:
        bench: which has seen it.
        progress: the accounts.
        count: how many batches are used, at least; None for all.
    """
    return State(
        b"",  # ONNX Runtime's random operators have seeds of their own
        {one.name: _written(one, account, bench) for one, account in progress.accounts.items()},
        {one.name: _written(one, account, bench) for one, account in progress.probe.items()},
        progress.next_batch,
        progress.samples,
        count,
        frozenset(bench.skipped),
    )


def from_state(bench: Workbench, state: State) -> Progress:
    """The accounts again; the workbench knows what it knew."""
    sites = {one.name: one for one in bench.network.statistics}
    bench.skipped |= state.skipped
    bench.resolution |= {sites[name]: account.site.resolution for name, account in state.accounts.items()}
    return Progress(_read(sites, state.accounts), _read(sites, state.probe), state.next_batch, state.samples)


def _written(one: Site, account: Account, bench: Workbench) -> book.Account:
    record = site.Site(one.name, "", "", one.eps, bench.resolution[one], one.before, momentum=one.momentum)
    return book.Account(record, (0, 0), account.seen, account.batches, account.average)


def _read(sites: Mapping[str, Site], accounts: Mapping[str, book.Account]) -> Accounts:
    return {sites[name]: Account(kept.seen, kept.calls, kept.average) for name, kept in accounts.items()}
