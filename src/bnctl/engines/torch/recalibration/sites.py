"""Sites: running statistics that a model keeps, the layers that read them, and why some are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bnctl.engines.torch.recalibration.operators import NormCall
from bnctl.errors import ModelError
from bnctl.numerics.moments import Moments
from bnctl.recalibration.statistics import (
    FROZEN,
    NEVER_REACHED,
    NO_STATISTICS,
    NOT_IN_STATE,
    NOT_SELECTED,
    discrepancy,
)
from bnctl.selection import Selection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

_MEAN = "running_mean"


@dataclass(frozen=True, eq=False)
class Site:
    """Statistics of one normalisation in the working copy.

    Args:
        name: path of the running mean, without ``.running_mean``.
        mean_path: name of the running mean among the model's buffers (or parameters).
        var_path: name of the running variance.
        mean: the working copy's running mean (C,).
        var: its running variance (C,).
        eps: of the layer.
        resolution: machine epsilon of its activations.
        before: mean and variance as they were, float64.
    """

    name: str
    mean_path: str
    var_path: str
    mean: torch.Tensor
    var: torch.Tensor
    eps: float
    resolution: float
    before: tuple[Vector, Vector]

    def stored(self) -> tuple[Vector, Vector]:
        """Mean and variance as the working copy holds them now, float64."""
        return _wide(self.mean), _wide(self.var)

    def store(self, moments: Moments) -> None:
        """Make the mean and population variance the layer's statistics, cast once to its dtype.

        Raises:
            ModelError: a value is too large for the dtype.
        """
        for tensor, value in zip((self.mean, self.var), self._cast(moments), strict=True):
            if not torch.isfinite(value).all():
                raise ModelError(
                    f"{self.name}: the new statistics do not fit {str(tensor.dtype).removeprefix('torch.')}",
                    hint="keep the normalisation layers in float32, or look for an exploding activation before them",
                )
            with torch.no_grad():
                tensor.copy_(value)

    def agrees(self, moments: Moments, tolerance: float) -> bool:
        """Whether storing the moments would change nothing, or next to nothing."""
        kept = zip((self.mean, self.var), self._cast(moments), strict=True)
        return all(torch.equal(old, new) for old, new in kept) or self.discrepancy(moments) < tolerance

    def discrepancy(self, moments: Moments) -> float:
        """See :func:`bnctl.recalibration.statistics.discrepancy`."""
        return discrepancy(self.stored(), moments, self.eps)

    def _cast(self, moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.from_numpy(moments.mean).to(self.mean.device, self.mean.dtype),
            torch.from_numpy(moments.variance()).to(self.var.device, self.var.dtype),
        )


class SiteTable:
    """Finds the site that an operator's call belongs to, and remembers what was met on the way.

    A site is known by the memory of its running mean: that holds for subclasses, functional calls, tied statistics and graphs.

    Args:
        model: the working copy, in eval mode and on its device.
        frozen: names of layers whose statistics shall not move (see :func:`frozen_on_purpose`).
        selection: what the user wants; a glob that is a frozen layer's very name thaws it.
    """

    def __init__(self, model: nn.Module, frozen: frozenset[str], selection: Selection) -> None:
        self._selection = selection
        self._frozen = frozen
        self._paths = {
            _place(tensor): path
            for path, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.numel() > 0
        }
        self._sites: dict[str, Site | None] = {}
        self._left: dict[str, tuple[str, str]] = {}
        self._known = dict(_reasons_unless_met(model))

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
        name = _name(path)
        if call.training:
            self._left[name] = (NO_STATISTICS, "normalises with its own input in inference, too")
            return None
        if name not in self._sites:
            self._sites[name] = self._open(name, path, var_path, call)
        return self._sites[name]

    def _open(self, name: str, path: str, var_path: str, call: NormCall) -> Site | None:
        wanted = self._selection(name)
        if wanted == "no":
            return None
        if wanted != "named" and name in self._frozen:
            self._left[name] = (FROZEN, "momentum 0, or in eval mode inside a model in train mode")
            return None
        return Site(
            name=name,
            mean_path=path,
            var_path=var_path,
            mean=call.mean,
            var=call.var,
            eps=call.eps,
            resolution=torch.finfo(call.x.dtype).eps,
            before=(_wide(call.mean), _wide(call.var)),
        )

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


_UNREACHED = (NEVER_REACHED, "no batch led to it")


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


def _wide(tensor: torch.Tensor) -> Vector:
    wide: Any = tensor.detach().to("cpu", torch.float64, copy=True).numpy()
    return wide  # type: ignore[no-any-return]
