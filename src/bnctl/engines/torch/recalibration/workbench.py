"""The working copy, the data, and one forward pass over one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bnctl.data.batches import Batch, Batches, CountedBatches
from bnctl.engines.torch.recalibration.memory import LiveStorages
from bnctl.engines.torch.recalibration.operators import NormCall, inference, intercepting
from bnctl.engines.torch.recalibration.sites import SiteTable, wide
from bnctl.engines.torch.recalibration.strand import Crew
from bnctl.engines.torch.recalibration.twins import Twins, place_of
from bnctl.engines.torch.recalibration.visits import Feed, OnSite, Visit, Written
from bnctl.engines.torch.state import put_back
from bnctl.errors import BnctlError, DataError
from bnctl.recalibration.book import Account
from bnctl.recalibration.estimate import with_prior
from bnctl.recalibration.method import check_pass, does_not_fit
from bnctl.recalibration.site import Site
from bnctl.recalibration.statistics import discrepancy
from bnctl.recalibration.until import part
from bnctl.recalibration.workers import Workers
from bnctl.runtime.tensors import as_tensors, does_not_run

if TYPE_CHECKING:
    from bnctl.recalibration.estimate import Statistics


def _nothing() -> None:
    """Do nothing."""


@dataclass(eq=False)
class Workbench:
    """Runs the working copy over this worker's share of the batches.

    Args:
        model: the working copy, in eval mode and on `device`; its statistics are the ones in force.
        sites: finds sites in it.
        batches: can be gone through as often as needed, and give as many samples each time.
        device: where the model is.
        workers: with whom the batches are shared: every worker takes one, in turn.
        hands: how many forward passes run at a time.
        progress: called with what is being done, how far it is, and out of how much.
        prior: weight of the old statistics, in samples.
        autocast: type in which operators run that do not mind; None: as the model is.
        skip_bad: leave out batches that hold NaN or infinity, instead of an error.
        limit: only batches of an index below; for data of unknown length.
        stride: only one batch of so many.
        samples: of all workers in a whole pass, once that is known.
        cut: whether this worker met the limit before the end of the data.
        skipped: batches that this worker left out.
        keep: called whenever a site was settled.
        random_state: of torch's generator at the start of each pass.
        one_by_one: whether forward passes follow one another, whatever the number of hands.
    """

    model: nn.Module
    sites: SiteTable
    batches: Batches
    device: torch.device
    workers: Workers
    hands: int
    progress: Callable[[str, int, int | None], None]
    prior: float = 0.0
    autocast: torch.dtype | None = None
    skip_bad: bool = False
    limit: int | None = None
    stride: int = 1
    samples: int | None = None
    cut: bool = False
    skipped: set[int] = field(default_factory=set)
    keep: Callable[[], None] = _nothing
    random_state: torch.Tensor = field(default_factory=torch.get_rng_state)
    one_by_one: bool = False
    _own: set[int] = field(default_factory=set)
    _paused_bytes: float | None = None

    def __post_init__(self) -> None:
        self.crew = Crew(self.hands)
        self.twins = Twins(self.model)

    def feeds(self, first: int = 0, step: int = 1) -> Iterator[Feed]:
        """This worker's share of one pass over the batches ``first, first + step, ...``, as tensors.

        Every pass starts at the same state of torch's generator: a loader that shuffles or augments with it gives the same data each time.

        Raises:
            DataError: a value is NaN or infinite.
        """
        torch.set_rng_state(self.random_state)
        step *= self.stride
        for index, batch in self.batches.every(first + step * self.workers.rank, step * self.workers.size):
            if self.limit is not None and index >= self.limit:
                self.cut = True
                return
            feed = self.feed(index, batch)
            if all(torch.isfinite(tensor).all() for tensor in feed.tensors()):
                yield feed
            elif self.skip_bad:
                self.skipped.add(index)
            else:
                raise DataError(
                    f"batch {index} holds NaN or infinity",
                    hint="statistics of it would be NaN, too: clean the data, or leave such batches out with --on-bad-batch skip",
                )

    def feed(self, index: int, batch: Batch) -> Feed:
        """A batch as tensors."""
        args, kwargs = as_tensors(batch, self.model, self.device)
        return Feed(index, args, kwargs, batch.size)

    def passed(self, samples: int) -> None:
        """A whole pass of all workers has ended, with so many samples.

        Raises:
            DataError: these are none, or not as many as last time.
        """
        check_pass(samples, self.samples, skipped=bool(self.workers.share(self.skipped, any)))
        self.samples = samples

    def total(self, step: int = 1) -> int | None:
        """Batches of all workers in a pass, where that is known."""
        if not isinstance(self.batches, CountedBatches):
            return self.limit
        return -(-len(self.batches) // (step * self.stride))

    def start_over(self, count: int | None) -> None:
        """The statistics as they were at the beginning, and another number of batches, at least."""
        self.stride, self.limit = part(self.batches, count)
        self.cut, self.samples, self.keep = False, None, _nothing
        self.skipped.clear()
        for site in self.sites.met():
            self._write(site, site.before)

    def run(
        self,
        feed: Feed,
        on_site: OnSite,
        *modes: TorchDispatchMode,
        on_write: Callable[[int], None] | None = None,
    ) -> None:
        """One forward pass in the calling thread, in a copy of the model's structure over the same parameters and buffers: what a
        forward leaves in attributes of its modules is then its own.

        Args:
            feed: the batch.
            on_site: called at each site.
            modes: in which it runs as well.
            on_write: called with the place of a shared parameter or buffer before the model writes to it.

        Raises:
            DataError: the model fails on the batch.
            Written: there is no `on_write`, and passes do not follow one another.
        """
        step, written = 0, set[int]()

        def look_at(tensor: torch.Tensor) -> None:
            if not self.twins.shares(place := place_of(tensor)):
                return
            if on_write is not None:
                on_write(place)
            elif not self.one_by_one:
                written.add(place)
                raise Written(place)

        def on_norm(call: NormCall) -> Any:
            nonlocal step
            site = self.sites.find(call)
            if site is not None:
                step += 1
                return on_site(Visit(feed, step, site, call))
            # in training the operator would also write to the statistics, which the other passes rely on
            return call.with_own_statistics() if call.training else None

        # a model may write into its input, and the batch is run again
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (feed.args, feed.kwargs))
        try:
            with self.twins.one() as model, ExitStack() as stack:
                if self.autocast is not None:
                    stack.enter_context(torch.autocast(self.device.type, self.autocast))
                stack.enter_context(inference(*modes, intercepting(on_norm, look_at)))
                model(*args, **kwargs)
            if written:  # and swallowed
                raise Written(min(written))
        except BnctlError:
            raise
        except Exception as error:
            raise does_not_run(feed.index, error) from error

    def learn(self, feed: Feed) -> float:
        """Most bytes per sample that a forward pass holds while it waits at a site, its input included; and what it writes to (:meth:`keep_apart`). From the
        first run of one sample, or of the whole batch where the model does not take a single one.
        """
        if self._paused_bytes is None:
            try:
                self._paused_bytes = self._learn(feed.one_sample())
            except DataError:
                self._paused_bytes = self._learn(feed)
        return self._paused_bytes

    def _learn(self, feed: Feed) -> float:
        inputs, most = feed.tensors(), 0
        tensors = [*self.model.parameters(), *self.model.buffers()]
        places = [(tensor, tensor.detach(), place_of(tensor)) for tensor in tensors]
        live = LiveStorages((*inputs, *tensors))
        before: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

        def measure(visit: Visit) -> None:
            nonlocal most
            most = max(most, live.size_bytes())

        def remember(place: int) -> None:
            if place not in before:
                there = [tensor for tensor in tensors if place_of(tensor) == place]
                before[place] = [(tensor, tensor.detach(), tensor.detach().clone()) for tensor in there]

        try:
            # a loader may draw from the same generator as the model
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self.run(feed, measure, live, on_write=remember)
        finally:
            with torch.no_grad():
                for tensor, memory, values in (entry for there in before.values() for entry in there):
                    put_back(tensor, memory, values)
            replaced = [entry for entry in places if place_of(entry[0]) != entry[2]]
            for tensor, memory, _ in replaced:
                tensor.data = memory
        self.keep_apart({*before, *(place for _, _, place in replaced)})
        return (most + sum(tensor.nbytes for tensor in inputs)) / max(feed.size, 1)

    def keep_apart(self, places: Iterable[int]) -> None:
        """What the model writes to belongs to each forward pass, from now on. Where that is memory of the statistics themselves, which all passes have to
        share, one pass follows another.
        """
        places = set(places)
        self._own |= places - self.sites.places
        self.one_by_one |= bool(places & self.sites.places)
        self.twins.give_own(self._own)
        if self.one_by_one:
            self.crew.dismiss()
            self.crew = Crew(1)

    @property
    def own_bytes(self) -> int:
        """What a forward pass has a copy of."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum(
            {p: t.untyped_storage().nbytes() for t in tensors if (p := place_of(t)) in self._own and p > 0}.values()
        )

    def stored(self, site: Site) -> Statistics:
        """Mean and variance as the working copy holds them now."""
        mean, var = self.sites.tensors(site)
        return wide(mean), wide(var)

    def statistics(self, account: Account) -> Statistics:
        """The statistics that follow from what a site saw in a whole pass."""
        site, seen = account.site, account.seen.values
        return with_prior(site.before, seen, self.samples or 0, self.prior, name=site.name)

    def store(self, site: Site, statistics: Statistics) -> None:
        """Give a site its statistics, cast once to their dtype.

        Raises:
            ModelError: a value is too large for the dtype.
        """
        for tensor, value in zip(self.sites.tensors(site), self._cast(site, statistics), strict=True):
            if not torch.isfinite(value).all():
                raise does_not_fit(site.name, str(tensor.dtype).removeprefix("torch."))
        self._write(site, statistics)

    def agrees(self, site: Site, statistics: Statistics, tolerance: float) -> bool:
        """Whether storing the statistics would change nothing, or next to nothing."""
        kept = zip(self.sites.tensors(site), self._cast(site, statistics), strict=True)
        return (
            all(torch.equal(old, new) for old, new in kept)
            or discrepancy(self.stored(site), statistics, site.eps) < tolerance
        )

    def _write(self, site: Site, statistics: Statistics) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.sites.tensors(site), self._cast(site, statistics), strict=True):
                tensor.copy_(value)

    def _cast(self, site: Site, statistics: Statistics) -> list[torch.Tensor]:
        return [
            torch.from_numpy(v).to(t.device, t.dtype) for t, v in zip(self.sites.tensors(site), statistics, strict=True)
        ]
