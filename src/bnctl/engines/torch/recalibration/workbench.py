"""The working copy, the data, and one forward pass over one batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnctl.engines.torch.recalibration.activations import activation_moments
from bnctl.engines.torch.recalibration.operators import NormCall, inference, intercepting
from bnctl.engines.torch.recalibration.sites import Site, SiteTable
from bnctl.errors import BnctlError, DataError, ModelError
from bnctl.numerics.moments import Moments
from bnctl.runtime.tensors import as_tensors

if TYPE_CHECKING:
    from bnctl.data.batches import Batch


@dataclass(frozen=True, eq=False)
class Feed:
    """A batch as tensors on the device; `index` counts from 0."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int

    def tensors(self) -> list[torch.Tensor]:
        """All tensors in it."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


@dataclass(eq=False)
class Tally:
    """Moments gathered in one pass over the data, by site in order of first arrival."""

    moments: dict[Site, Moments] = field(default_factory=dict)
    calls: dict[Site, int] = field(default_factory=dict)

    def add(self, site: Site, moments: Moments, *, between: bool) -> None:
        """Merge what one call saw."""
        known = self.moments.get(site)
        self.moments[site] = moments if known is None else known.merge(moments, between=between)
        self.calls[site] = self.calls.get(site, 0) + 1


OnSite = Callable[[Site, NormCall], Any]
"""Called at each site; a result other than None takes the place of the operator's."""


@dataclass(eq=False)
class Workbench:
    """Runs the working copy over the batches.

    Args:
        model: the working copy, in eval mode and on `device`; its statistics are the ones in force.
        sites: finds sites in it.
        batches: can be gone through as often as needed, and give as many samples each time.
        device: where the model is.
        progress: called with what is being done, how far it is, and out of how much.
    """

    model: nn.Module
    sites: SiteTable
    batches: Iterable[Batch]
    device: torch.device
    progress: Callable[[str, int, int | None], None]
    samples: int | None = None
    _random_state: torch.Tensor = field(default_factory=torch.get_rng_state)

    def feeds(self) -> Iterator[Feed]:
        """One pass over the data, as tensors. Every pass starts at the same state of torch's generator: a loader that
        shuffles or augments with it gives the same data each time.

        Raises:
            DataError: there are no data, other data than last time, or a value is NaN or infinite.
        """
        torch.set_rng_state(self._random_state)
        samples, index = 0, -1
        for index, batch in enumerate(self.batches):
            args, kwargs = as_tensors(batch, self.model, self.device)
            feed = Feed(index, args, kwargs, batch.size)
            for tensor in feed.tensors():
                if not torch.isfinite(tensor).all():
                    raise DataError(
                        f"batch {index} holds NaN or infinity",
                        hint="statistics of it would be NaN, too: clean the data",
                    )
            samples += batch.size
            yield feed
        if index < 0:
            raise DataError("the data hold no batch", hint="check the data; a generator can be gone through only once")
        if self.samples is not None and samples != self.samples:
            raise DataError(
                f"the data held {self.samples} samples in the first pass and {samples} in a later one",
                hint="give something that can be iterated again with the same result, such as a list or a DataLoader",
            )
        self.samples = samples

    def twin(self) -> nn.Module:
        """A copy of the model's structure over the same parameters and buffers: what a forward leaves in attributes of
        its modules is then its own."""
        return copied(self.model, shared=(*self.model.parameters(), *self.model.buffers()))

    def run(self, feed: Feed, on_site: OnSite, *modes: TorchDispatchMode, model: nn.Module | None = None) -> None:
        """One forward pass in the calling thread.

        Args:
            feed: the batch.
            on_site: called at every site.
            modes: further dispatch modes; they see calls after the interception.
            model: instead of the working copy, its twin.

        Raises:
            DataError: the model fails on the batch.
        """

        def on_norm(call: NormCall) -> Any:
            site = self.sites.find(call)
            if site is not None:
                return on_site(site, call)
            # in training the operator would also write to the statistics, which the other passes rely on
            return call.with_own_statistics() if call.training else None

        try:
            with inference(*modes, intercepting(on_norm)):
                (self.model if model is None else model)(*feed.args, **feed.kwargs)
        except BnctlError:
            raise
        except Exception as error:
            raise DataError(
                f"batch {feed.index} does not run through the model: {type(error).__name__}: {error}",
                hint="check shape, dtype and preprocessing of the data against what the model's forward takes",
            ) from error


def gather(tally: Tally, feed: Feed, site: Site, call: NormCall) -> Moments:
    """Moments of the call's input, which the tally takes too.

    Raises:
        DataError: the input is not finite.
    """
    moments = activation_moments(call.x, per_instance=call.per_instance)
    if not (np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all()):
        raise DataError(
            f"batch {feed.index}: the input of {site.name} holds NaN or infinity",
            hint="the batch itself is finite: an operator before this layer overflows; try float32, or check the preprocessing",
        )
    tally.add(site, moments, between=not call.per_instance)
    return moments


def copied(model: nn.Module, shared: Iterable[torch.Tensor] = ()) -> nn.Module:
    """A deep copy, except for `shared` tensors.

    Raises:
        ModelError: the model cannot be copied.
    """
    try:
        with warnings.catch_warnings():
            # torch's own, about the tree specs in an exported graph
            warnings.simplefilter("ignore", FutureWarning)
            return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="remove computed tensors from module attributes (torch.nn.utils.remove_weight_norm) or detach them",
        ) from error
