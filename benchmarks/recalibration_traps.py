"""Small cases in which methods of recalibration go wrong: each measures one thing on a network whose right answer is known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from recalibration_peers import Method
from recalibration_truth import norms
from torch import nn

RIGHT = 0.01
"""Off by less than this is right: in standard deviations, and as a ratio of variances. Whether one divides by n or n - 1 does not matter here."""


class Twice(nn.Module):
    """One norm called on two inputs, neither of which depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.bn(x), self.bn(3 * x + 1)])


class Interrupted(Exception):
    """What the loader raises."""


class Raising(list[torch.Tensor]):
    """Two batches, and an error in place of the third."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self[:2]
        raise Interrupted


def uneven(method: Method) -> str:
    """Batches of 8, 8 and 1 images, the last one brighter: what counts is the number of values."""
    x = _images(17)
    x[16] += 5
    return _judged(method, nn.Sequential(nn.BatchNorm2d(3)), x.split(8), x)


def far_mean(method: Method) -> str:
    """Mean 1000, standard deviation 0.01: the difference of two squares has nothing left of it in float32."""
    x = 1000 + 0.01 * _images(16)
    return _judged(method, nn.Sequential(nn.BatchNorm2d(3, eps=1e-12)), x.split(8), x)


def dropout(method: Method) -> str:
    """Dropout before the norm has to stay off."""
    x = _images(16)
    return _judged(method, nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)), x.split(8), x)


def called_twice(method: Method) -> str:
    """A norm that is called twice in a pass has the statistics of all its calls."""
    x = _images(16)
    return _judged(method, Twice(), x.split(8), torch.cat([x, 3 * x + 1]))


def raising(method: Method) -> str:
    """The loader raises after two batches: nothing of the model may have changed."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    before = _state(model)
    try:
        method(model, Raising(_images(24).split(8)))
    except Exception as error:
        if not isinstance(error, Interrupted) and not isinstance(error.__cause__, Interrupted):
            return f"{type(error).__name__}"
        after = _state(model)
    else:
        return "no error"
    changed = [part for part in before if before[part] != after[part]]
    return f"no: {', '.join(changed)}" if changed else "yes"


def _images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _judged(method: Method, model: nn.Module, batches: Sequence[torch.Tensor], seen: torch.Tensor) -> str:
    """Against the moments of all that the norm sees, in float64."""
    model.eval()
    try:
        done = method(copy.deepcopy(model), batches)
    except Exception as error:
        return f"{type(error).__name__}"
    (layer,) = norms(done).values()
    wide = seen.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    off_mean = ((layer.running_mean.double() - mean).abs() / var.sqrt()).max().item()
    off_var = (layer.running_var.double() / var - 1).abs().max().item()
    return (
        "yes"
        if max(off_mean, off_var) < RIGHT
        else f"no: mean off by {_short(off_mean)} sd, variance by {_short(100 * off_var)} %"
    )


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _state(model: nn.Module) -> dict[str, Any]:
    modules = list(model.modules())
    return {
        "statistics": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": [m.training for m in modules],
        "momentum": [getattr(m, "momentum", None) for m in modules],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
    }


TRAPS: dict[str, Callable[[Method], str]] = {
    "model as it was when the loader raises": raising,
    "uneven last batch": uneven,
    "dropout stays off": dropout,
    "mean 1000, sd 0.01": far_mean,
    "layer called twice": called_twice,
}
