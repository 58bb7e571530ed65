"""Recalibration: running statistics of normalisation layers, taken anew from data.

The methods exact and batch give each site the mean and the population variance (divided by n) over all samples, positions and calls.
``torch`` trains with the unbiased variance of one batch, as an estimate from few values. Here n counts the values over *all* data, and
the spread of the batches' means is part of the sum, so the correction would be n/(n-1): 1.00002 for 1,000 samples of an 8x8 map.
Without it the layer's output over these very data has variance 1 (but for eps), and that is what `self_consistency` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from bnctl.data.batches import Batches, as_batches
from bnctl.engines.torch.copies import copied
from bnctl.engines.torch.recalibration.run import Found, Run, with_values
from bnctl.engines.torch.recalibration.sites import SiteTable, frozen_on_purpose
from bnctl.engines.torch.recalibration.workbench import Workbench
from bnctl.errors import ModelError, UsageError
from bnctl.recalibration.book import Book
from bnctl.recalibration.method import Method, check_method
from bnctl.recalibration.partial import Partial
from bnctl.recalibration.statistics import NOT_CONVERGED, Recalibrated, SiteStatistics, count_dead, discrepancy, drift
from bnctl.recalibration.until import check_tolerance
from bnctl.recalibration.workers import Alone, Workers
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch

__all__ = ["Method", "Recalibrated", "SiteStatistics", "recalibrate"]


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
) -> Recalibrated[nn.Module]:
    """New running statistics from data, in a copy of the model.

    ``mean = sum(x)/n``, ``var = sum((x - mean)**2)/n`` per channel, in float64, cast once; n counts all values of a channel over all
    batches, so the size of the batches does not weigh. (For instance normalisation with tracked statistics: the averages
    over samples of their means and variances, which is what it tracks.)

    **exact**: `x` is what the layer sees in inference, when every layer before it has its final statistics. All batches run in
    lockstep and each activation is computed once; where that would take more than `memory_bytes` (or too many threads), in one
    pass per layer, with the same result. A layer that is called several times, or late by some batches, is iterated to a fixed point.

    **batch** (Ioffe & Szegedy 2015, algorithm 2; Wu & Johnson 2021, "PreciseBN"): every layer normalises with the statistics of its
    own batch. One pass; one batch in 32 is run again with the new statistics for `self_consistency`. The result depends on the batch size.

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
    check_method(method, prior)
    check_tolerance(until)
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
        run = Run(method, selection, bench, memory_bytes, partial_file or Partial())
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


def _bench(
    model: nn.Module, batches: Batches, selection: Selection, device: str, *, hands: int, **how: Any
) -> Workbench:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is TorchScript, whose layers cannot be told apart from outside",
            hint="recalibrate the module that it was made of, or an export of it by torch.export",
        )
    work = copied(model, type(model).__name__)
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


def _with_statistics(model: nn.Module, bench: Workbench, book: Book, method: Method) -> nn.Module:
    result = copied(model, type(model).__name__)
    state = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    with torch.no_grad():
        for account in with_values(book):
            site = account.site
            for path, value in zip((site.mean_path, site.var_path), bench.sites.tensors(site), strict=True):
                state[path].copy_(value)
            tracked = state.get(f"{site.name}.num_batches_tracked")
            if method == "ema" and tracked is not None:
                tracked += account.calls
    return result


def _report(bench: Workbench, found: Found) -> list[SiteStatistics]:
    done = {}
    for account in with_values(found.book):
        site, values = account.site, account.seen.values
        moving, after = site.name in found.moving, found.produced[site.name]
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
            self_consistency=None if after is None else discrepancy(bench.stored(site), after, site.eps),
            standard_error=float(account.seen.standard_error().max(initial=0.0)),
        )
    left = {
        name: SiteStatistics(name, "left", code, reason)
        for name, code, reason in bench.sites.left(recalibrated=set(done))
    }
    return [*done.values(), *left.values()]


@contextmanager
def _keeping_random_state(device: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") and torch.cuda.is_available() else []):
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
