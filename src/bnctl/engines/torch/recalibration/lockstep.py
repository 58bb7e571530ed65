"""All batches at once: each forward waits at each layer for the others, and every activation is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnctl.engines.torch.recalibration.operators import NormCall
from bnctl.engines.torch.recalibration.schedules import Settled, settle
from bnctl.engines.torch.recalibration.sites import Site
from bnctl.engines.torch.recalibration.strand import Strand
from bnctl.engines.torch.recalibration.workbench import Feed, Tally, Workbench, gather


def lockstep(bench: Workbench, feeds: list[Feed], fixed: Collection[Site], settled: Settled) -> Tally:
    """One round in which every forward is a strand that waits at each site that is not settled.

    One forward runs at a time, in the order of the batches. When all wait or have ended, the site that was reached first is
    settled from everything that arrived there, and those who waited for it go on. So there is always somebody who can go on,
    whatever way the batches take; a batch that comes to a site later finds it settled, and
    :func:`~bnctl.engines.torch.recalibration.schedules.solve` sees to it.
    """
    tally = Tally()
    strands = [Strand[_Step](partial(_forward, bench, feed), f"batch {feed.index}") for feed in feeds]

    def advance(strand: Strand[_Step]) -> Site | None:
        """Run to the next site that is not settled; None at the end."""
        while (step := strand.resume()) is not None:
            if isinstance(step, _Operation):
                step.run()
            else:
                gather(tally, step.feed, step.site, step.call)
                if step.site not in settled and step.site not in fixed:
                    return step.site
        return None

    try:
        ready, waiting = strands, dict[Site, list[Strand[_Step]]]()
        while ready:
            for strand in ready:
                if (site := advance(strand)) is not None:
                    waiting.setdefault(site, []).append(strand)
            first = next(iter(waiting), None)  # in order of arrival
            ready = [] if first is None else waiting.pop(first)
            if first is not None:
                settle(bench, first, tally.moments[first], settled)
    finally:
        for strand in strands:
            strand.close()
    return tally


class _Operation:
    """An operator that a strand wants to have run; made by the thread in whose place it runs."""

    def __init__(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = partial(operator, *args, **kwargs)
        # which layers of the dispatcher the call has passed already is the thread's own knowledge
        self._dispatch = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        self._result: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with torch.no_grad(), torch._C._ForceDispatchKeyGuard(*self._dispatch):
                self._result = self._call()
        except Exception as error:  # belongs to the model's forward, which may know what to do
            self._error = error

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


@dataclass(frozen=True, eq=False)
class _Arrival:
    """A strand has come to a site."""

    feed: Feed
    site: Site
    call: NormCall


_Step = _Operation | _Arrival


def _forward(bench: Workbench, feed: Feed, pause: Callable[[_Step], None]) -> None:
    def arrive(site: Site, call: NormCall) -> None:
        pause(_Arrival(feed, site, call))

    bench.run(feed, arrive, _ByOwner(pause), model=bench.twin())


class _ByOwner(TorchDispatchMode):
    """Has every operator run by the strand's owner.

    OpenMP gives each thread that runs an operator its own team of workers, and where there are more threads than cores they
    stop to spin and must be woken for every operator: measured on two cores, a convolution took four times as long.
    """

    def __init__(self, pause: Callable[[_Step], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pause = pause

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = _Operation(func, args, kwargs or {})
        self._pause(operation)
        return operation.result()
