"""Recalibration of ONNX models: running statistics taken anew from data, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from bnctl.codes import Obstacle
from bnctl.data.batches import as_batches
from bnctl.engines.onnx.editor import Editor
from bnctl.engines.onnx.lift import lift
from bnctl.engines.onnx.recalibration.find import EPS_ASSUMED, MERGED, find_sites
from bnctl.engines.onnx.recalibration.kept import as_state, from_state
from bnctl.engines.onnx.recalibration.network import Network
from bnctl.engines.onnx.recalibration.rewire import store
from bnctl.engines.onnx.recalibration.schedules import Account, Accounts, Progress, batch_by_batch, level_by_level
from bnctl.engines.onnx.recalibration.sites import Arrays, Site
from bnctl.engines.onnx.recalibration.workbench import Workbench
from bnctl.recalibration.estimate import PROBE, produced, with_prior
from bnctl.recalibration.memory import DEFAULT_SHARE, available_bytes
from bnctl.recalibration.method import Method, check_method, one_value, without_sites
from bnctl.recalibration.partial import Partial
from bnctl.recalibration.seen import Seen, largest_error
from bnctl.recalibration.statistics import (
    FROZEN,
    NEVER_REACHED,
    NOT_SELECTED,
    Recalibrated,
    SiteStatistics,
    count_dead,
    discrepancy,
    drift,
)
from bnctl.recalibration.until import check_tolerance, pilot, run_until
from bnctl.runtime.arena import shared_arena
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch


@dataclass(frozen=True)
class Taken:
    """What one run makes of the data.

    Args:
        accounts: what each site saw.
        stored: its new statistics.
        probe: accounts of the batches of which `measured` is.
        measured: under the new statistics.
    """

    accounts: Accounts
    stored: dict[Site, Arrays]
    probe: Accounts
    measured: Accounts

    def standard_error(self) -> float:
        """The largest of all channels' means, in standard deviations."""
        return largest_error(account.seen for account in self.accounts.values())


def recalibrate(
    model: ir.Model,
    batches: Iterable[Batch],
    *,
    method: Method = "exact",
    where: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    prior: float = 0.0,
    until: float | None = None,
    threads: int = 1,
    progress: Callable[[str, int, int | None], None] | None = None,
    memory_bytes: int | None = None,
    on_bad_batch: Literal["refuse", "skip"] = "refuse",
    name: str = "the ONNX model",
    partial_file: Partial | None = None,
    resume: bool = False,
) -> Recalibrated[ir.Model]:
    """New running statistics from data, in a structural copy of the model.

    ``mean = sum(x)/n``, ``var = sum((x - mean)**2)/n`` per channel, in float64, cast once; n counts all values of a channel over all batches.

    **exact**: `x` is what the node sees in inference, when every one before it has its final statistics. Sites that do not depend on each other are settled
    together, and the values between two such levels are held for all batches, so that each activation is computed once. Where that would take more than
    `memory_bytes`, levels are reached by computing again what comes before, with the same result.

    **batch** (Ioffe & Szegedy 2015, algorithm 2; Wu & Johnson 2021, "PreciseBN"): every site normalises with the statistics of its own batch. One pass, and
    one over one batch in every ``PROBE`` that measures `self_consistency`.

    **ema**: what training would leave: the same pass, and ``mean = (1 - a) mean + a mean_b``, ``var = (1 - a) var + a var_b n_b/(n_b - 1)`` after each batch b.
    The operator's ``momentum`` is the weight of the old, ``1 - a``; a site where that is 1 is left (BN303).

    Sites are BatchNormalization nodes of the main graph, and arithmetic that an exporter made of them
    (:mod:`~bnctl.engines.onnx.recalibration.chains`). Each gets initializers of its own, so that nodes that shared a tensor need not agree. Local functions
    that hold layers are put in place of their calls. Statistics that a caller may override are left (BN305); other overridable initializers have their
    defaults while statistics are taken.

    Args:
        model: left alone.
        batches: gone through several times; each pass must give the same samples.
        method: see above.
        where: globs over site names.
        skip: globs over site names to leave.
        prior: old statistics count as so many more samples (:func:`~bnctl.recalibration.estimate.with_prior`); not for ema.
        until: standard error of each channel's mean, in standard deviations, at which the data are enough; None: all data.
        threads: of ONNX Runtime.
        progress: called with what is being done, how far it is, and out of how much (None where unknown).
        memory_bytes: what may be held between two levels; by default half of what is available.
        on_bad_batch: a batch that holds NaN or infinity is an error ("refuse"), or left out ("skip").
        name: what to call the model in errors.
        partial_file: where to keep what is known so far.
        resume: go on from what it holds.

    Raises:
        DataError: there are no data, they are not finite, or the model does not run on them.
        ModelError: the model has no normalisation whose statistics can be told, or cannot store the new ones.
        UsageError: the method or a glob is none, or the prior is off.
    """
    check_method(method, prior)
    check_tolerance(until)
    selection = Selection(where, skip)
    lifted = lift(model)
    found = find_sites(lifted)
    _check_sites(found, name)
    selection.check(found)
    if method == "ema":
        found = {name: _moving(site) for name, site in found.items()}
    sites = [site for site in found.values() if isinstance(site, Site) and selection.takes(site.name)]
    bench = Workbench(
        Network(lifted.model, sites), as_batches(batches), threads, name, progress or _silent, on_bad_batch == "skip"
    )

    def pooled(site: Site, account: Account) -> Arrays:
        values = account.seen.values
        samples = bench.samples or 0
        mixed = with_prior(site.before, values, samples, prior, name=site.name) if values.count else site.before
        return site.encode(mixed)

    def averaged(site: Site, account: Account) -> Arrays:
        return site.encode(account.average)

    partial_file = partial_file or Partial()
    state = partial_file.read() if resume else None

    def once(count: int | None) -> Taken:
        nonlocal state
        bench.start_over(count)
        begun = Progress() if state is None else from_state(bench, state)
        state = None

        def keep(progress: Progress) -> None:
            partial_file.keep(as_state(bench, progress, count))

        if method == "exact":
            budget = int(available_bytes() * DEFAULT_SHARE) if memory_bytes is None else memory_bytes
            accounts = level_by_level(bench, pooled, budget, begun, keep)
            return Taken(
                accounts, {site: pooled(site, account) for site, account in accounts.items()}, accounts, accounts
            )
        gathered = batch_by_batch(bench, _own_statistics, "gather", begun=begun, keep=keep)
        settle = pooled if method == "batch" else averaged
        stored = {site: settle(site, account) for site, account in gathered.accounts.items()}
        measured = batch_by_batch(bench, lambda site, index, seen: stored[site], "measure", PROBE)
        return Taken(gathered.accounts, stored, gathered.probe, measured.accounts)

    def all_seen() -> bool:
        return bench.stride == 1 and not bench.cut

    first = pilot(bench.batches) if state is None and until is not None else None if state is None else state.count
    try:
        with shared_arena():
            if until is None:
                taken, enough = once(None), None
            else:
                taken, enough = run_until(until, first, once, Taken.standard_error, all_seen)
    except BaseException:
        partial_file.write()
        raise
    editor = Editor(lifted.model)
    done = {}
    for site, arrays in taken.stored.items():
        if taken.accounts[site].count:
            store(editor, site, arrays)
            done[site.name] = _done(site, taken, bench.resolution[site])
    report = [done.get(name) or _left(name, site, selection) for name, site in found.items()]
    return Recalibrated(editor.model, report, bench.samples or 0, sorted(bench.skipped), taken.standard_error(), enough)


def _check_sites(found: Mapping[str, Site | Obstacle], name: str) -> None:
    """Refuse a model that has been folded: what may be left of a normalisation is no site."""
    merged = [site for site in found.values() if isinstance(site, Obstacle) and site.code == MERGED]
    if len(merged) == len(found):
        also = f": in {len(merged)} affines per channel, they may be merged with gamma and beta ({MERGED})"
        raise without_sites(name, also if merged else "")


def _moving(site: Site | Obstacle) -> Site | Obstacle:
    """A site whose statistics training would move."""
    if isinstance(site, Site) and site.momentum == 0:
        return Obstacle(
            FROZEN,
            "its momentum is 1, with which training leaves the old statistics (so momentum 0 and None are exported)",
        )
    return site


def _own_statistics(site: Site, index: int, seen: Seen) -> Arrays:
    if seen.values.count == 1:
        raise one_value(index, site.name)
    return site.encode((seen.values.mean, seen.values.variance()) if seen.values.count else site.before)


def _done(site: Site, taken: Taken, resolution: float) -> SiteStatistics:
    account, after = taken.accounts[site], site.decode(taken.stored[site])
    values = account.seen.values
    some = (one[site].seen if site in one else None for one in (taken.probe, taken.measured))
    in_inference = produced(account.seen, *some)
    return SiteStatistics(
        name=site.name,
        action="recalibrated",
        code=None if site.form == "variance" else EPS_ASSUMED,
        reason=None
        if site.form == "variance"
        else f"sqrt(var + eps) is stored, and eps is not in the graph: {site.eps:g} is assumed",
        channels=len(values.mean),
        count=values.count,
        calls=account.batches,
        dead_channels=count_dead(values, resolution),
        drift=drift(site.before, after, site.eps),
        self_consistency=None if in_inference is None else discrepancy(after, in_inference, site.eps),
        standard_error=float(account.seen.standard_error().max(initial=0.0)),
    )


def _left(name: str, site: Site | Obstacle, selection: Selection) -> SiteStatistics:
    if not selection.takes(name):
        return SiteStatistics(name, "left", NOT_SELECTED, "not selected by where and skip")
    if isinstance(site, Obstacle):
        return SiteStatistics(name, "left", site.code, site.detail)
    return SiteStatistics(name, "left", NEVER_REACHED, "all that came there was empty")


def _silent(what: str, done: int, total: int | None) -> None:
    """Say nothing."""
