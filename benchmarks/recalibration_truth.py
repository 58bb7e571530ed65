"""What the running statistics should be, naively and in float64; and how far others are off."""

from __future__ import annotations

import copy

import torch
from torch import nn


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers with running statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None}


@torch.no_grad()
def settled(model: nn.Module, images: torch.Tensor, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy whose statistics are of what each layer sees in inference, when all layers before it have theirs already.

    All images go through it as one batch, in inference, and a layer is given its statistics when its input arrives: numpy's two-pass mean and variance, in
    float64. No sample depends on another but through these, so it is what one pass over the data per layer gives; nothing of bnctl is used. Every layer must be
    called once.
    """
    result = copy.deepcopy(model).to(dtype).eval()
    done: set[nn.Module] = set()

    def settle(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert layer not in done, f"{layer} is called twice"
        done.add(layer)
        x = arguments[0].double().numpy()
        over = tuple(axis for axis in range(x.ndim) if axis != 1)
        layer.running_mean.copy_(torch.from_numpy(x.mean(over)))
        layer.running_var.copy_(torch.from_numpy(x.var(over)))

    handles = [layer.register_forward_pre_hook(settle) for layer in norms(result).values()]
    result(images.to(dtype))
    for handle in handles:
        handle.remove()
    return result


def error(model: nn.Module, truth: nn.Module) -> tuple[float, float]:
    """Largest error over layers and channels: of the mean in standard deviations, of the variance as a ratio.

    ``max |mean - mean'| / sqrt(var' + eps)`` and ``max |var - var'| / (var' + eps)``, primes for the truth.
    """
    worst = [0.0, 0.0]
    layers = norms(model)
    for name, right in norms(truth).items():
        scale = right.running_var.double() + right.eps
        off_mean = (layers[name].running_mean.double() - right.running_mean).abs() / scale.sqrt()
        off_var = (layers[name].running_var.double() - right.running_var).abs() / scale
        off = (float(value.nan_to_num(nan=float("inf")).max()) for value in (off_mean, off_var))
        worst = list(map(max, worst, off))
    return worst[0], worst[1]
