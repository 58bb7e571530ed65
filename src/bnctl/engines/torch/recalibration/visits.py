"""A batch as tensors, and a call of a site while it is processed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bnctl.engines.torch.recalibration.activations import activations_seen
from bnctl.engines.torch.recalibration.operators import NormCall
from bnctl.recalibration.book import Moment
from bnctl.recalibration.method import not_finite
from bnctl.recalibration.seen import Seen
from bnctl.recalibration.site import Site


@dataclass(frozen=True, eq=False)
class Feed:
    """A batch as tensors on the device; `index` counts from 0 over the data of all workers."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int

    def tensors(self) -> list[torch.Tensor]:
        """All tensors in it."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def one_sample(self) -> Feed:
        """The first sample, where every tensor has one row per sample; else the whole."""
        if not all(tensor.shape[:1] == (self.size,) for tensor in self.tensors()):
            return self
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor[:1], (self.args, self.kwargs))
        return Feed(self.index, args, kwargs, min(self.size, 1))


@dataclass(frozen=True)
class Visit:
    """A call of a site.

    Args:
        feed: the batch.
        step: the number of the call in its forward pass, from 1.
        site: which.
        call: what the operator was given.
    """

    feed: Feed
    step: int
    site: Site
    call: NormCall

    def look(self) -> Seen:
        """Moments of the call's input.

        Raises:
            DataError: the input is not finite.
        """
        return look([self])[0]

    def when(self) -> Moment:
        """The batch, and the number of the call in it."""
        return self.feed.index, self.step

    def kind(self) -> tuple[object, ...]:
        """Calls of one kind can be looked at together."""
        x = self.call.x
        return x.shape, x.dtype, x.device, self.call.per_instance


def look(visits: Sequence[Visit]) -> list[Seen]:
    """Moments of the inputs of calls of one kind.

    Raises:
        DataError: one is not finite.
    """
    all_seen = activations_seen([visit.call.x for visit in visits], per_instance=visits[0].call.per_instance)
    for visit, seen in zip(visits, all_seen, strict=True):
        if not (np.isfinite(seen.values.mean).all() and np.isfinite(seen.values.m2).all()):
            raise not_finite(visit.feed.index, visit.site.name)
    return all_seen


class Written(BaseException):
    """A forward pass is about to write to what all passes share. Not an Exception, so that user code does not swallow it.

    Args:
        place: of the storage.
    """

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


OnSite = Callable[[Visit], Any]
"""Called at each site; a result other than None takes the place of the operator's."""
