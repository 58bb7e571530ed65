"""Recalibration: running statistics of normalisation layers, taken anew from data.

The methods exact and batch give each site the mean and the population variance (divided by n) over all samples, positions and calls.
``torch`` trains with the unbiased variance of one batch, as an estimate from few values. Here n counts the values over *all* data, and
the spread of the batches' means is part of the sum, so the correction would be n/(n-1): 1.00002 for 1,000 samples of an 8x8 map.
Without it the layer's output over these very data has variance 1 (but for eps), and that is what `self_consistency` checks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from bnctl.data.batches import Batches, as_batches, first_of
from bnctl.engines.torch.recalibration.lockstep import lockstep
from bnctl.engines.torch.recalibration.memory import DEFAULT_SHARE, LiveStorages, available_bytes
from bnctl.engines.torch.recalibration.schedules import (
    PROBE,
    Round,
    Settled,
    measure,
    pass_per_site,
    pass_with_own_batches,
    settle,
    solve,
)
from bnctl.engines.torch.recalibration.sites import SiteTable, frozen_on_purpose
from bnctl.engines.torch.recalibration.twins import copied
from bnctl.engines.torch.recalibration.workbench import Feed, Visit, Workbench
from bnctl.errors import DataError, ModelError, UsageError
from bnctl.recalibration.book import Account, Book
from bnctl.recalibration.partial import Partial, State
from bnctl.recalibration.statistics import NOT_CONVERGED, SiteStatistics, count_dead, discrepancy, drift
from bnctl.recalibration.workers import Alone, Workers
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.recalibration.estimate import Statistics

__all__ = ["Method", "Recalibrated", "SiteStatistics", "recalibrate"]

Method = Literal["exact", "batch", "ema"]

MAX_STRANDS = 512
"""Most batches that are run in lockstep: each is a thread, and systems limit their number."""

PILOT_SAMPLES = 64
"""So many samples, at least, say how many are needed."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """What came of it.

    Attributes:
        model: the copy with new statistics.
        sites: what happened to each site; those with new statistics first, in order of execution.
        samples: how many the statistics rest on.
        skipped: numbers of the batches that were left out since they hold NaN or infinity.
        standard_error: the largest of all channels' means, in standard deviations.
        enough: whether that is within the tolerance; None where none was given.
    """

    model: nn.Module
    sites: list[SiteStatistics]
    samples: int
    skipped: list[int]
    standard_error: float
    enough: bool | None


def recalibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: Method = "exact",
    where: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    prior: float = 0.0,
    until: float | None = None,
    device: str = "cpu",
    threads: int | None = None,
    autocast: torch.dtype | None = None,
    on_bad_batch: Literal["refuse", "skip"] = "refuse",
    progress: Callable[[str, int, int | None], None] | None = None,
    memory_bytes: int | None = None,
    workers: Workers | None = None,
    partial_file: Partial | None = None,
    resume: bool = False,
) -> Recalibrated:
    """New running statistics from data, in a copy of the model.

    ``mean = sum(x)/n``, ``var = sum((x - mean)**2)/n`` per channel, in float64, cast once; n counts all values of a channel over all
    batches, so the size of the batches does not weigh. (For instance normalisation with tracked statistics: the averages
    over samples of their means and variances, which is what it tracks.)

    **exact**: `x` is what the layer sees in inference, when every layer before it has its final statistics. All batches run in
    lockstep and each activation is computed once; where that would take more than `memory_bytes` (or too many threads), in one
    pass per layer, with the same result. A layer that is called several times, or late by some batches, is iterated to a fixed point.

    **batch** (Ioffe & Szegedy 2015, algorithm 2; Wu & Johnson 2021, "PreciseBN"): every layer normalises with the statistics of its
    own batch. One pass; one batch in 16 is run again with the new statistics for `self_consistency`. The result depends on the batch size.

    **ema**: what training would leave: the same pass, and ``mean = (1 - a) mean + a mean_b``, ``var = (1 - a) var + a var_b n_b / (n_b - 1)`` after each
    batch b, with the layer's own momentum a. ``num_batches_tracked`` advances.

    The model runs in eval mode: dropout is off. Only running means and variances differ in the result: modes, momentum, hooks and (but for ema)
    ``num_batches_tracked`` are as they were. Forward hooks run, being part of what the model computes. The state of torch's random generator is put back.
    Operators run on one thread each, `threads` batches at a time: the result is the same, bit for bit, for any number of threads and workers.

    Args:
        model: left alone; any module that runs, exported graphs too. Layers are found where they call the operator, whatever their class.
        batches: gone through several times; each pass must give the same samples.
        method: see above.
        where: globs over site names; a frozen layer is recalibrated only where a glob is its very name.
        skip: globs over site names to leave.
        prior: old statistics count as so many more samples (:func:`~bnctl.recalibration.estimate.with_prior`); not for ema.
        until: use no more batches than it takes for the standard error of every channel's mean to be at most so many standard deviations.
        device: where to compute; the result stays where the model is.
        threads: batches that are run at a time on a processor; by default as many as torch has threads.
        autocast: run operators that do not mind in this type; moments are float64 all the same.
        on_bad_batch: what to do about a batch that holds NaN or infinity.
        progress: called with what is being done, how far it is, and out of how much (None where unknown).
        memory_bytes: what paused forwards may hold; by default half of what is available.
        workers: processes that share the batches; all must be given the same arguments.
        partial_file: where to keep what is known so far.
        resume: go on from what it holds.

    Raises:
        DataError: there are no data, they are not finite, or the model does not run on them.
        ModelError: the model has no normalisation, cannot be copied, or cannot store the new statistics.
        UsageError: the method, the device or a glob is none.
    """
    _check(method, prior, until)
    selection = Selection(where, skip)
    with _one_thread_each() as all_threads, _keeping_random_state(device):
        bench = _bench(
            model,
            as_batches(batches),
            selection,
            device,
            workers=workers or Alone(),
            hands=threads or all_threads,
            progress=progress or _silent,
            prior=prior,
            autocast=autocast,
            skip_bad=on_bad_batch == "skip",
        )
        run = _Run(method, selection, bench, memory_bytes, partial_file or Partial())
        try:
            found, enough = run.until(until, resume=resume)
        except BaseException:
            if bench.workers.rank == 0:
                run.partial.write()
            raise
        finally:
            bench.crew.dismiss()
        skipped = bench.workers.share(bench.skipped, lambda of_workers: sorted(set().union(*of_workers)))
        return Recalibrated(
            _with_statistics(model, bench, found.book, method),
            _report(bench, found),
            bench.samples or 0,
            skipped,
            found.standard_error(),
            enough,
        )


@dataclass(frozen=True, eq=False)
class _Found:
    """Accounts of all sites, what the new statistics produce in inference, and the sites that did not settle."""

    book: Book
    produced: dict[str, Statistics]
    moving: set[str]

    def standard_error(self) -> float:
        errors = (
            account.seen.standard_error().max(initial=0.0) for account in self.book.accounts.values() if account.count
        )
        return float(max(errors, default=0.0))


@dataclass(eq=False)
class _Run:
    method: Method
    selection: Selection
    bench: Workbench
    memory_bytes: int | None
    partial: Partial

    def until(self, tolerance: float | None, *, resume: bool) -> tuple[_Found, bool | None]:
        """Recalibrate on as many batches as it takes, and whether they were enough."""
        bench = self.bench
        state = bench.workers.share(
            self.partial.read() if resume and not bench.workers.rank else None, lambda found: found[0]
        )
        limit = None if tolerance is None else self._pilot()
        if state is not None:
            bench.random_state = torch.frombuffer(bytearray(state.random_state), dtype=torch.uint8)
            limit = state.limit
        while True:
            bench.start_over(limit)
            found = self._once(state)
            if tolerance is None:
                return found, None
            error = found.standard_error()
            if error <= tolerance or limit is None or bench.workers.share(bench.exhausted, all):
                return found, error <= tolerance
            growth = min((error / tolerance) ** 2 * 1.1, 16.0)
            state, limit = None, max(limit + 1, math.ceil(limit * growth))

    def _pilot(self) -> int:
        return max(2, -(-PILOT_SAMPLES // first_of(self.bench.batches).size))

    def _once(self, state: State | None) -> _Found:
        if self.method == "exact":
            return self._exact(state)
        bench = self.bench
        book, probe = Book(), Book()
        if state is not None:
            book.accounts |= state.accounts
            probe.accounts |= state.probe

        def enter(first: int, samples: int) -> None:
            book.enter(bench.workers)
            probe.enter(bench.workers)
            self._keep(book.accounts, probe.accounts, first, samples)

        pass_with_own_batches(
            bench, book, probe, enter, *((0, 0) if state is None else (state.next_batch, state.samples))
        )
        _check_sites(bench, self.selection)
        for account in _with_values(book):
            bench.store(account.site, account.average if self.method == "ema" else bench.statistics(account))
        produced = measure(bench, PROBE)
        return _Found(book, {a.site.name: _produced(a, probe, produced) for a in _with_values(book)}, set())

    def _exact(self, state: State | None) -> _Found:
        bench, settled = self.bench, Settled()
        round_ = self._round()
        bench.keep = lambda: self._keep(settled, {}, 0, bench.samples or 0)
        for account in () if state is None else state.accounts.values():
            settle(bench, account, settled)
        book, moving = solve(bench, round_, settled)
        return _Found(book, {a.site.name: a.seen.values.statistics() for a in _with_values(book)}, moving)

    def _round(self) -> Round:
        """Lockstep where the paused forwards of every worker fit into its memory, else one pass per site."""
        bench = self.bench
        budget = self.memory_bytes
        if budget is None:
            budget = int(available_bytes(bench.device) * DEFAULT_SHARE)
        feeds: list[Feed] = []
        per_sample, samples, fits = 0.0, 0, True
        for feed in bench.feeds():
            if not feeds:
                per_sample = _paused_bytes(bench, feed)
            samples += feed.size
            fits = per_sample * samples <= budget and len(feeds) < MAX_STRANDS
            if not fits:
                break
            feeds.append(feed)
        _check_sites(bench, self.selection)
        if bench.workers.share(fits, all):
            bench.passed(bench.workers.share(samples, sum))
            return partial(lockstep, bench, feeds)
        _log.info(
            "one pass per layer: %d batches would hold %.0f MB, of %.0f",
            len(feeds) + 1,
            per_sample * samples / 1e6,
            budget / 1e6,
        )
        return partial(pass_per_site, bench)

    def _keep(
        self, accounts: Mapping[str, Account], probe: Mapping[str, Account], next_batch: int, samples: int
    ) -> None:
        if self.bench.workers.rank == 0:
            random_state = self.bench.random_state.numpy().tobytes()
            self.partial.keep(State(random_state, dict(accounts), dict(probe), next_batch, samples, self.bench.limit))


def _check(method: str, prior: float, until: float | None) -> None:
    if method not in get_args(Method):
        raise UsageError(
            f"no such method of recalibration: {method!r}", hint=f"the methods are {', '.join(get_args(Method))}"
        )
    if not (math.isfinite(prior) and prior >= 0):
        raise UsageError(f"the prior is {prior}", hint="it is a number of samples, 0 or more")
    if prior and method == "ema":
        raise UsageError(
            "a moving average has no prior: it starts from the old statistics", hint="use the method exact or batch"
        )
    if until is not None and not 0 < until < math.inf:
        raise UsageError(f"the tolerance of the means is {until}", hint="it is a positive number, such as 0.01")


def _bench(
    model: nn.Module, batches: Batches, selection: Selection, device: str, *, hands: int, **how: Any
) -> Workbench:
    work = copied(model)
    for module in work.modules():
        # not eval(): exported graphs refuse it, and models override train() to keep layers in train mode
        module.training = False
    try:
        place = torch.device(device)
        work = work.to(place)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA assert
        raise UsageError(f"torch cannot use device {device!r}: {error}", hint="use the device cpu") from error
    sites = SiteTable(work, frozen_on_purpose(model), selection)
    return Workbench(work, sites, batches, place, hands=hands if place.type == "cpu" else 1, **how)


def _check_sites(bench: Workbench, selection: Selection) -> None:
    """Refuse a model without sites, and globs that name none. Every worker calls this in step."""
    names = bench.workers.share(
        bench.sites.names(), lambda of_workers: [name for names in of_workers for name in names]
    )
    if not names:
        raise ModelError(
            f"{type(bench.model).__name__} has no normalisation with running statistics",
            hint="if it was folded, recalibrate the model from before; else insert normalisation first (bnctl insert)",
        )
    selection.check(names)


def _paused_bytes(bench: Workbench, feed: Feed) -> float:
    """Most bytes per sample that a forward holds while it waits at a site, and its input; from a run of one sample with the old statistics, or of the whole
    batch where the model does not take a single one.
    """
    try:
        return _paused_bytes_of(bench, feed.one_sample())
    except DataError:
        return _paused_bytes_of(bench, feed)


def _paused_bytes_of(bench: Workbench, feed: Feed) -> float:
    inputs = feed.tensors()
    live = LiveStorages((*inputs, *bench.model.parameters(), *bench.model.buffers()))
    most = 0

    def look(visit: Visit) -> None:
        nonlocal most
        most = max(most, live.size_bytes())

    bench.run(feed, look, live)
    return (most + sum(tensor.nbytes for tensor in inputs)) / max(feed.size, 1)


def _with_values(book: Book) -> list[Account]:
    return [account for account in book.in_order() if account.count]


def _produced(account: Account, probe: Book, measured: Book) -> Statistics:
    """What the new statistics produce over all data, from what they do to some batches: the difference between what was gathered there and what is
    measured now is free of the chance that chose these batches.
    """
    gathered, now = probe.accounts.get(account.site.name), measured.accounts.get(account.site.name)
    mean, var = account.seen.values.statistics()
    if gathered is None or now is None or not (gathered.count and now.count):
        return mean, var
    (mean_g, var_g), (mean_n, var_n) = gathered.seen.values.statistics(), now.seen.values.statistics()
    return mean + (mean_n - mean_g), var * np.divide(var_n, var_g, out=np.ones_like(var), where=var_g > 0)


def _with_statistics(model: nn.Module, bench: Workbench, book: Book, method: Method) -> nn.Module:
    result = copied(model)
    state = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    with torch.no_grad():
        for account in _with_values(book):
            site = account.site
            for path, value in zip((site.mean_path, site.var_path), bench.sites.tensors(site), strict=True):
                state[path].copy_(value)
            tracked = state.get(f"{site.name}.num_batches_tracked")
            if method == "ema" and tracked is not None:
                tracked += account.calls
    return result


def _report(bench: Workbench, found: _Found) -> list[SiteStatistics]:
    done = {}
    for account in _with_values(found.book):
        site, values = account.site, account.seen.values
        moving = site.name in found.moving
        done[site.name] = SiteStatistics(
            name=site.name,
            action="recalibrated",
            code=NOT_CONVERGED if moving else None,
            reason="its statistics depend on themselves, and the iteration did not settle" if moving else None,
            channels=len(values.mean),
            count=values.count,
            calls=account.calls,
            dead_channels=count_dead(values, site.resolution),
            drift=drift(site.before, bench.stored(site), site.eps),
            self_consistency=discrepancy(bench.stored(site), found.produced[site.name], site.eps),
            standard_error=float(account.seen.standard_error().max(initial=0.0)),
        )
    left = {
        name: SiteStatistics(name, "left", code, reason)
        for name, code, reason in bench.sites.left(recalibrated=set(done))
    }
    return [*done.values(), *left.values()]


@contextmanager
def _keeping_random_state(device: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        yield


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Operators run on one thread each; how many there were.

    Batches side by side use a processor's cores better than one operator on all of them. And OpenMP gives each thread that runs an operator a team of its
    own, whose members stop to spin where there are more of them than cores: measured on two cores, a convolution took four times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _silent(what: str, done: int, total: int | None) -> None:
    """Say nothing."""
