"""Which statistics of a torch model an operator reads, and why some of them are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnctl.engines.torch.recalibration.operators import NormCall
from bnctl.engines.torch.recalibration.twins import place_of
from bnctl.recalibration.site import Site
from bnctl.recalibration.statistics import (
    FROZEN,
    NEVER_REACHED,
    NO_STATISTICS,
    NOT_IN_STATE,
    NOT_SELECTED,
)
from bnctl.selection import Selection

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MEAN = "running_mean"


class SiteTable:
    """Finds the site that an operator's call belongs to, and remembers what was met on the way.

    A site is known by the memory of its running mean: that holds for subclasses, functional calls, tied statistics and graphs.

    Args:
        model: the working copy, in eval mode and on its device.
        frozen: names of layers whose statistics shall not move (see :func:`frozen_on_purpose`).
        selection: what the user wants; a glob that is a frozen layer's very name thaws it.

    Attributes:
        places: storages of the statistics that were met.
    """

    def __init__(self, model: nn.Module, frozen: frozenset[str], selection: Selection) -> None:
        self._selection = selection
        self._frozen = frozen
        self._paths = {
            _place(tensor): path
            for path, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel() > 0 and place_of(tensor) > 0
        }
        self.places: set[int] = set()
        self._sites: dict[str, Site | None] = {}
        self._left: dict[str, tuple[str, str]] = {}
        self._known = dict(_reasons_unless_met(model))
        self._state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._training = {
            name: (layer.momentum, layer.num_batches_tracked)
            for name, layer in model.named_modules()
            if hasattr(layer, "momentum") and isinstance(getattr(layer, "num_batches_tracked", None), torch.Tensor)
        }

    def find(self, call: NormCall) -> Site | None:
        """The site whose statistics shall be replaced; None where they shall not."""
        path = self._paths.get(_place(call.mean))
        var_path = self._paths.get(_place(call.var))
        if path is None or var_path is None:
            self._left["(unnamed)"] = (
                NOT_IN_STATE,
                "running statistics that are neither buffer nor parameter of the model",
            )
            return None
        self.places |= {place_of(call.mean), place_of(call.var)}
        name = _name(path)
        if call.training:
            self._left[name] = (NO_STATISTICS, "normalises with its own input in inference, too")
            return None
        if name not in self._sites:  # several threads may make the same one, of which the first is kept
            self._sites.setdefault(name, self._open(name, path, var_path, call))
        return self._sites[name]

    def _open(self, name: str, path: str, var_path: str, call: NormCall) -> Site | None:
        wanted = self._selection(name)
        if wanted == "no":
            return None
        if wanted != "named" and name in self._frozen:
            self._left[name] = (FROZEN, "momentum 0, or in eval mode inside a model in train mode")
            return None
        momentum, tracked = self._training.get(name, (call.momentum, 0))
        return Site(
            name=name,
            mean_path=path,
            var_path=var_path,
            eps=call.eps,
            resolution=torch.finfo(call.x.dtype).eps,
            before=(wide(call.mean), wide(call.var)),
            between=not call.per_instance,
            momentum=momentum,
            calls_before=int(tracked),
        )

    def met(self) -> list[Site]:
        """The sites that were found so far."""
        return [site for site in self._sites.values() if site is not None]

    def tensors(self, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """The working copy's running mean and variance, (C,)."""
        return self._state[site.mean_path], self._state[site.var_path]

    def left(self, recalibrated: set[str]) -> Iterator[tuple[str, str, str]]:
        """Name, code and reason of everything that has no new statistics."""
        for name in self.names():
            if name in recalibrated:
                continue
            if not self._selection.takes(name):
                yield name, NOT_SELECTED, "not selected by where and skip"
            else:
                yield name, *(self._left.get(name) or self._known.get(name) or _UNREACHED)

    def names(self) -> list[str]:
        """All sites: those met so far in order of execution, then the others in the model's order."""
        return list(dict.fromkeys((*self._sites, *self._left, *self._known)))


_UNREACHED = (NEVER_REACHED, "no batch led to a normalisation that reads its statistics")


def frozen_on_purpose(model: nn.Module) -> frozenset[str]:
    """Names of the layers whose statistics shall not move, by the marks that training code leaves.

    These are momentum 0, and eval mode of the layer in a model that is in train mode. Parameters without gradient are no
    such mark: they say nothing about statistics, and whole models are frozen that way for inference.
    """
    return frozenset(
        name
        for name, layer in model.named_modules()
        if getattr(layer, _MEAN, None) is not None
        and (getattr(layer, "momentum", None) == 0 or (model.training and not layer.training))
    )


def _reasons_unless_met(model: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    unique = {_name(path) for path, _ in model.named_buffers()}  # tied statistics under their first name only
    for name, layer in model.named_modules():
        holds = name or _MEAN
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is None:
            if not isinstance(layer, nn.modules.instancenorm._InstanceNorm):  # which has no statistics by default
                yield holds, (NO_STATISTICS, "track_running_stats=False")
        elif _MEAN in layer._buffers and "weight" in layer._buffers:
            yield holds, (FROZEN, f"{type(layer).__name__}: statistics and weights are constants")
        elif layer._buffers.get(_MEAN) is not None and holds in unique:
            yield holds, _UNREACHED


def _name(path: str) -> str:
    return path.removesuffix(f".{_MEAN}")


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def wide(tensor: torch.Tensor) -> NDArray[Any]:
    """A copy in float64."""
    return tensor.detach().to("cpu", torch.float64, copy=True).numpy()
