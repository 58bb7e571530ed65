"""Recalibration: running statistics of normalisation layers, taken anew from data.

Both methods give each site the mean and the population variance (divided by n) over all samples, positions and calls. ``torch`` trains with the unbiased
variance of one batch, as an estimate from few values. Here n counts the values over *all* data, and the spread of the batches' means is part of the
sum, so the correction would be n/(n-1): 1.00002 for 1,000 samples of an 8x8 map. Without it the layer's output over these very data has
variance 1 (but for eps), and that is what `self_consistency` checks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from bnctl.engines.torch.recalibration.lockstep import lockstep
from bnctl.engines.torch.recalibration.memory import DEFAULT_SHARE, LiveStorages, available_bytes
from bnctl.engines.torch.recalibration.operators import NormCall
from bnctl.engines.torch.recalibration.schedules import (
    Round,
    measure,
    pass_per_site,
    pass_with_own_batches,
    solve,
)
from bnctl.engines.torch.recalibration.sites import Site, SiteTable, frozen_on_purpose
from bnctl.engines.torch.recalibration.workbench import Feed, Tally, Workbench, copied
from bnctl.errors import ModelError, UsageError
from bnctl.recalibration.statistics import NOT_CONVERGED, SiteStatistics, count_dead, drift
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch

__all__ = ["Method", "SiteStatistics", "recalibrate"]

Method = Literal["exact", "batch"]

MAX_STRANDS = 512
"""Most batches that are run in lockstep: each is a thread, and systems limit their number."""

_log = logging.getLogger(__name__)


def recalibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: Method = "exact",
    where: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int | None], None] | None = None,
    memory_bytes: int | None = None,
) -> tuple[nn.Module, list[SiteStatistics], int]:
    """New running statistics from data, in a copy of the model.

    ``mean = sum(x)/n``, ``var = sum((x - mean)**2)/n`` per channel, in float64, cast once; n counts all values of a channel over all
    batches, so the size of the batches does not weigh. (For instance normalisation with tracked statistics: the averages
    over samples of their means and variances, which is what it tracks.)

    **exact**: `x` is what the layer sees in inference, when every layer before it has its final statistics. All batches run in
    lockstep and each activation is computed once; where that would take more than `memory_bytes` (or too many threads), in one
    pass per layer, with the same result. A layer that is called several times, or late by some batches, is iterated to a fixed point.

    **batch** (Ioffe & Szegedy 2015, algorithm 2; Wu & Johnson 2021, "PreciseBN"): every layer normalises with the statistics of its
    own batch. One pass, and another one that measures `self_consistency`. The result depends on the batch size.

    The model runs in eval mode: dropout is off. Only running means and variances differ in the result: modes, momentum, hooks and
    ``num_batches_tracked`` are as they were (the latter counts steps of training, and none was made). Forward hooks run, being
    part of what the model computes. The state of torch's random generator is put back.

    Args:
        model: left alone; any module that runs, exported graphs too. Layers are found where they call the operator, whatever their class.
        batches: gone through several times; each pass must give the same samples.
        method: see above.
        where: globs over site names; a frozen layer is recalibrated only where a glob is its very name.
        skip: globs over site names to leave.
        device: where to compute; the result stays where the model is.
        progress: called with what is being done, how far it is, and out of how much (None where unknown).
        memory_bytes: what paused forwards may hold; by default half of what is available.

    Returns:
        The copy, what happened to each site in order of execution, and the number of samples.

    Raises:
        DataError: there are no data, they are not finite, or the model does not run on them.
        ModelError: the model has no normalisation, cannot be copied, or cannot store the new statistics.
        UsageError: the method, the device or a glob is none.
    """
    if method not in ("exact", "batch"):
        raise UsageError(f"no such method of recalibration: {method!r}", hint="the methods are exact and batch")
    selection = Selection(where, skip)
    bench = _bench(model, batches, selection, device, progress or _silent)
    with _keeping_random_state(bench.device):
        moving: set[Site] = set()
        if method == "exact":
            tally, moving = solve(_exact_round(bench, selection, memory_bytes))
        else:
            gathered = pass_with_own_batches(bench)
            _check_sites(bench, selection)
            for site, moments in gathered.moments.items():
                if moments.count:
                    site.store(moments)
            tally = measure(bench)
    return _with_statistics(model, tally), _report(bench, tally, moving), bench.samples or 0


def _bench(
    model: nn.Module,
    batches: Iterable[Batch],
    selection: Selection,
    device: str,
    progress: Callable[[str, int, int | None], None],
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
    return Workbench(work, SiteTable(work, frozen_on_purpose(model), selection), batches, place, progress)


def _exact_round(bench: Workbench, selection: Selection, memory_bytes: int | None) -> Round:
    """Lockstep where the paused forwards fit into memory, else one pass per site."""
    budget = memory_bytes
    if budget is None:
        budget = int(available_bytes(bench.device) * DEFAULT_SHARE)
    feeds: list[Feed] = []
    need = per_sample = 0.0
    for feed in bench.feeds():
        if not feeds:
            per_sample = _paused_bytes(bench, feed) / max(feed.size, 1)
            _check_sites(bench, selection)
        feeds.append(feed)
        need += per_sample * max(feed.size, 1)
        if need > budget or len(feeds) > MAX_STRANDS:
            _log.info(
                "one pass per layer: %d batches would hold %.0f MB, of %.0f", len(feeds), need / 1e6, budget / 1e6
            )
            return partial(pass_per_site, bench)
    return partial(lockstep, bench, feeds)


def _paused_bytes(bench: Workbench, feed: Feed) -> int:
    """Most bytes that a forward of this batch holds while it waits at a site, and the batch; from one run with the old statistics."""
    inputs = feed.tensors()
    live = LiveStorages((*inputs, *bench.model.parameters(), *bench.model.buffers()))
    most = 0

    def look(site: Site, call: NormCall) -> None:
        nonlocal most
        most = max(most, live.size_bytes())

    bench.run(feed, look, live)
    return most + sum(tensor.nbytes for tensor in inputs)


def _with_statistics(model: nn.Module, tally: Tally) -> nn.Module:
    result = copied(model)
    state = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    with torch.no_grad():
        for site, moments in tally.moments.items():
            if moments.count:
                state[site.mean_path].copy_(site.mean)
                state[site.var_path].copy_(site.var)
    return result


def _report(bench: Workbench, tally: Tally, moving: set[Site]) -> list[SiteStatistics]:
    done = {
        site.name: SiteStatistics(
            name=site.name,
            action="recalibrated",
            code=NOT_CONVERGED if site in moving else None,
            reason="its statistics depend on themselves, and the iteration did not settle" if site in moving else None,
            channels=len(moments.mean),
            count=moments.count,
            calls=tally.calls[site],
            dead_channels=count_dead(moments, site.resolution),
            drift=drift(site.before, site.stored(), site.eps),
            self_consistency=site.discrepancy(moments),
        )
        for site, moments in tally.moments.items()
        if moments.count
    }
    left = {
        name: SiteStatistics(name, "left", code, reason)
        for name, code, reason in bench.sites.left(recalibrated=set(done))
    }
    return [(done | left)[name] for name in bench.sites.names()]


@contextmanager
def _keeping_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _check_sites(bench: Workbench, selection: Selection) -> None:
    names = bench.sites.names()
    if not names:
        raise ModelError(
            f"{type(bench.model).__name__} has no normalisation with running statistics",
            hint="if it was folded, recalibrate the model from before; else insert normalisation first (bnctl insert)",
        )
    selection.check(names)


def _silent(what: str, done: int, total: int | None) -> None:
    """Say nothing."""
