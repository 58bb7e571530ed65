"""Tiny torch networks that break naive folding, the naive fold itself, and the comparison that must catch it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from bnctl.engines.torch.nested import tensors_in

WRONG = 1e-2
"""What the naive fold must be wrong by, for a trap to be one."""


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, gamma (negative and 0 among them) and beta as after a training; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low
        tensor.data.copy_(values)

    for module in model.modules():
        if isinstance(module, _NormBase):
            if module.running_mean is not None:
                draw(module.running_mean, -1, 1)
                draw(module.running_var, 0.2, 2)
            if module.weight is not None:
                draw(module.weight, -1.5, 1.5)
                draw(module.bias, -1, 1)
                module.weight.data[-1] = 0
    return model.eval()


def naive_fold(model: nn.Module) -> nn.Module:
    """What pattern matchers do: fuse every conv, conv-transpose or linear with the BatchNorm that follows in the order of definition."""
    model = copy.deepcopy(model)
    before: nn.Module | None = None
    for path, module in list(model.named_modules()):
        if isinstance(module, _NormBase) and before is not None and module.running_var is not None:
            scale = (module.running_var + module.eps).rsqrt()
            scale = scale if module.weight is None else scale * module.weight
            shift = -module.running_mean * scale + (0 if module.bias is None else module.bias)
            weight: Tensor = before.weight.data  # type: ignore[assignment, union-attr]
            if weight.shape[0] == len(scale):  # the output axis, as for a conv: wrong for a conv-transpose
                bias = torch.zeros_like(shift) if before.bias is None else before.bias
                before.weight.data = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)  # type: ignore[union-attr, operator]
                before.bias = nn.Parameter((bias * scale + shift).detach().to(weight.dtype))  # type: ignore[assignment]
                model.set_submodule(path, nn.Identity())
        if not list(module.children()):
            before = module if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) else None
    return model


def outputs(model: nn.Module, args: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """All tensors that a copy of the model returns, as float64; the copy and its inputs are cast to dtype first."""
    model = copy.deepcopy(model)
    args = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, args if isinstance(args, tuple) else (args,))
    if dtype is not None:
        model = model.to(dtype)
        args = tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, args)
    with torch.no_grad():
        keywords = len(args) == 1 and isinstance(args[0], dict)
        result = model(**args[0]) if keywords else model(*args)
    return [t.double() for t in tensors_in(result) if t.is_floating_point()]


def error(reference: list[Tensor], candidate: list[Tensor]) -> float:
    """Largest error over all outputs, relative to the root mean square of each."""
    assert [t.shape for t in reference] == [t.shape for t in candidate]
    assert reference
    return max(
        float((a - b).abs().max() / a.square().mean().sqrt().clamp_min(1e-30))
        for a, b in zip(reference, candidate, strict=True)
    )


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    """One thread for tiny networks; and a capture collects garbage, where what importing torch has left need not be looked through each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (self, *inputs)."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class BNReLU(nn.BatchNorm2d):
    """A BatchNorm with an activation in its code."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class BNChildAct(nn.BatchNorm2d):
    """A BatchNorm with an activation as a child, as timm's BatchNormAct2d."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.PReLU(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


class FrozenBN(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.eps = 1e-3
        self.register_buffer("weight", torch.linspace(-1, 2, features))
        self.register_buffer("bias", torch.linspace(1, -1, features))
        self.register_buffer("running_mean", torch.linspace(-1, 1, features))
        self.register_buffer("running_var", torch.linspace(0.1, 2, features))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)  # type: ignore[operator]
        scale = w * (self.running_var.reshape(1, -1, 1, 1) + self.eps).rsqrt()  # type: ignore[operator]
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale  # type: ignore[operator]
        return x * scale + shift


class StdConv(nn.Conv2d):
    """A convolution whose weight is standardised in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class FunctionalBN(nn.Module):
    """A convolution and a BatchNorm in the code of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("running_mean", torch.randn(4))
        self.register_buffer("running_var", torch.rand(4) + 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, self.weight), self.running_mean, self.running_var).relu()  # type: ignore[arg-type]


class LayerScale(nn.Module):
    """A learned factor per channel on the last axis."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
