"""Recalibration of torch models: naive references, and small models to try it on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bnctl.data.batches import Batch
from bnctl.engines.torch import recalibrate as engine
from bnctl.recalibration.statistics import SiteStatistics

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10_resnet20"
SCHEDULES = {"lockstep": None, "pass_per_site": 0}
"""`memory_bytes` that leads to each schedule of the exact method."""


def recalibrate(model: nn.Module, batches: Iterable[Any], **how: Any) -> tuple[nn.Module, list[SiteStatistics], int]:
    """Three batches at a time, so that every test runs strands side by side."""
    found = engine.recalibrate(model, batches, **{"threads": 3, **how})
    return found.model, found.sites, found.samples


def conv(channels_in: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, padding=1)


class Plain(nn.Module):
    """Two norms, dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.bn2 = conv(4, 5), nn.BatchNorm2d(5, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.head, self.bn3 = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu_(x + self.bn2(self.conv2(x)))
        return self.bn3(self.head(x.mean((2, 3))))


class Concat(nn.Module):
    """Branches of different depth, joined before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = conv(3, 2), nn.BatchNorm2d(2)
        self.b, self.bn_b = conv(2, 3), nn.BatchNorm2d(3)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.bn_a(self.a(x)).sigmoid()
        return self.bn(torch.cat([a, self.bn_b(self.b(a))], 1))


class Stashing(nn.Module):
    """Keeps an activation in an attribute between layers, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.kept: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.conv1(x)
        y = self.conv2(self.bn1(self.kept))
        return self.bn2(y + self.kept)


class Reused(nn.Module):
    """One norm called three times, each call on what the one before made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 3), nn.BatchNorm2d(3)
        self.last, self.bn_last = conv(3, 4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.bn(self.conv(x)))
        return self.bn_last(self.last(x))


class Heads(nn.Module):
    """A head shared by several scales, with two norms in a chain: called again, but not fed by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 3), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = conv(3, 3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        scales = [x, F.avg_pool2d(x, 2), x[:, :, 1:]]
        return [self.bn2(self.conv2(F.relu(self.bn1(self.conv1(scale))))) for scale in scales]


class Branchy(nn.Module):
    """Batches take different ways: some skip a norm, and two norms come in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, 3), nn.BatchNorm2d(3)
        self.bn_a, self.bn_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bn_rare = nn.BatchNorm2d(3)
        self.bn_last = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        way = int(x[0, 0, 0, 0] * 1000) % 3
        x = self.conv(x)
        if way == 0:
            x = self.bn_b(torch.tanh(self.bn_a(x)))
        elif way == 1:
            x = self.bn_a(torch.tanh(self.bn_b(x)))
        else:
            x = self.bn_rare(x)
        return self.bn_last(F.relu(self.bn(x)))


ONCE = (Plain, Residual, Concat, Stashing)
AGAIN = (Reused, Heads, Branchy)


def images(samples: int = 23, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 3, samples).reshape(-1, 1, 1, 1)
    return torch.rand(samples, 3, 6, 6, generator=generator) * scale + 1


def split(x: torch.Tensor, size: int) -> list[Batch]:
    return [Batch((part,)) for part in x.split(size)]


def make(build: type[nn.Module], *, double: bool = True, seed: int = 0) -> nn.Module:
    """A net with statistics that are no defaults; by default in double precision, so that references can be met closely."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
    return net.double() if double else net


def norms(net: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def inputs_of(net: nn.Module, name: str, batches: Iterable[Batch]) -> np.ndarray:
    """All that a norm sees in eval mode, (C, everything): an ordinary hook, all data in memory."""
    seen: list[np.ndarray] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        x = args[0].double().numpy()
        seen.append(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).copy())

    handle = norms(net)[name].register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            net(*batch.args)
    handle.remove()
    return np.concatenate(seen, axis=1) if seen else np.empty((0, 0))


def order_of_execution(net: nn.Module, batches: Iterable[Batch]) -> list[str]:
    names: dict[str, None] = {}
    handles = [
        m.register_forward_pre_hook(lambda *_, n=name: names.update({n: None})) for name, m in norms(net).items()
    ]
    with torch.no_grad():
        for batch in batches:
            net(*batch.args)
    for handle in handles:
        handle.remove()
    return list(names)


def reference(model: nn.Module, batches: list[Batch], *, sweeps: int = 1) -> nn.Module:
    """Norm after norm in order of execution, each from all that it sees; sweeps until nothing moves for reused ones."""
    net = copy.deepcopy(model).eval()
    for _ in range(sweeps):
        for name in order_of_execution(net, batches):
            x = inputs_of(net, name, batches)
            norms(net)[name].running_mean.copy_(torch.from_numpy(x.mean(1)))
            norms(net)[name].running_var.copy_(torch.from_numpy(x.var(1)))
    return net


def error(net: nn.Module, other: nn.Module) -> float:
    """Largest relative difference of running statistics."""
    worst = 0.0
    for name, norm in norms(net).items():
        ref = norms(other)[name]
        sd = ref.running_var.sqrt()
        worst = max(worst, ((norm.running_mean - ref.running_mean).abs() / sd).max().item())
        worst = max(worst, ((norm.running_var - ref.running_var).abs() / ref.running_var).max().item())
    return worst


def by_name(sites: list[SiteStatistics]) -> dict[str, SiteStatistics]:
    return {site.name: site for site in sites}


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}
