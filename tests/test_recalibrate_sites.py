"""Recalibration: what is a norm, and which are left for which reason."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnctl.engines.torch.recalibration import schedules
from bnctl.errors import UsageError
from bnctl.models.importing import import_module
from bnctl.recalibration.statistics import SiteStatistics
from torch_recalibration import (
    Plain,
    Residual,
    Reused,
    by_name,
    conv,
    images,
    inputs_of,
    make,
    recalibrate,
    split,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- what is a norm


class Functional(nn.Module):
    """A norm that no class of torch stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stats_mean", torch.zeros(3))
        self.register_buffer("stats_var", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.stats_mean, self.stats_var)


def population(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_functional_norm(method: Any) -> None:
    x = images()
    result, sites, _ = recalibrate(Functional(), split(x, 5), method=method)
    torch.testing.assert_close((result.stats_mean, result.stats_var), population(x))
    assert sites[0].name == "stats_mean"


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_sync_norm_needs_no_process_group(method: Any) -> None:
    x = images()
    result, _, _ = recalibrate(nn.SyncBatchNorm(3), split(x, 5), method=method)
    torch.testing.assert_close((result.running_mean, result.running_var), population(x))


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_timm_norm_with_activation(method: Any) -> None:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    timm_layers = import_module("timm.layers")
    x = images()
    net = nn.Sequential(timm_layers.BatchNormAct2d(3), nn.Conv2d(3, 3, 1))
    result, sites, _ = recalibrate(net, split(x, 5), method=method)
    torch.testing.assert_close((result[0].running_mean, result[0].running_var), population(x))
    assert sites[0].name == "0"


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_instance_norm_gets_the_averages_that_it_tracks(method: Any) -> None:
    x = images()
    result, _, _ = recalibrate(nn.InstanceNorm2d(3, track_running_stats=True), split(x, 5), method=method)
    torch.testing.assert_close(result.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(result.running_var, x.var((2, 3), correction=0).mean(0))


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("method", ["exact", "batch"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_graph(method: Any, decompose: bool) -> None:
    net, x = make(Residual, double=False).eval(), images()
    dims = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    program = torch.export.export(net, (x,), dynamic_shapes=dims)
    module = (program.run_decompositions() if decompose else program).module()
    result, sites, _ = recalibrate(module, split(x, 8), method=method)
    expected, _, _ = recalibrate(net, split(x, 8), method=method)
    assert [site.name for site in sites] == ["bn1", "bn2", "bn3"]
    buffers = dict(result.named_buffers())
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


def test_tied_statistics_are_one_site() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4)).double()
    net[3].running_mean, net[3].running_var = net[1].running_mean, net[1].running_var
    result, sites, _ = recalibrate(net, split(images().double(), 5))
    assert [(site.name, site.calls) for site in sites] == [("1", 10)]
    assert result[3].running_mean is result[1].running_mean
    assert sites[0].self_consistency < 1e-6


# ---- what is left, and why


def codes(sites: list[SiteStatistics]) -> dict[str, str | None]:
    return {site.name: site.code for site in sites}


def test_selection() -> None:
    net, batches = make(Residual), split(images().double(), 5)
    result, sites, _ = recalibrate(net, batches, where="bn*", skip=["bn2"])
    assert codes(sites) == {"bn1": None, "bn2": "BN301", "bn3": None}
    assert torch.equal(result.bn2.running_mean, net.bn2.running_mean)
    half = copy.deepcopy(net)
    half.bn1, half.bn3 = result.bn1, result.bn3
    x = inputs_of(half.eval(), "bn3", batches)  # what went through the old statistics of bn2
    np.testing.assert_allclose(result.bn3.running_mean, x.mean(1), rtol=1e-10)
    for method in ("exact", "batch"):
        with pytest.raises(UsageError, match="no layer matches 'nothing'"):
            recalibrate(net, batches, where="nothing", method=method)


@pytest.mark.parametrize("mark", ["eval mode", "momentum"])
@pytest.mark.parametrize("method", ["exact", "batch"])
def test_frozen_on_purpose(mark: str, method: Any) -> None:
    net, batches = make(Residual).train(), split(images().double(), 5)
    if mark == "eval mode":
        net.bn1.eval()
    else:
        net.bn1.momentum = 0.0
    result, sites, _ = recalibrate(net, batches, method=method)
    assert codes(sites) == {"bn1": "BN303", "bn2": None, "bn3": None}
    assert torch.equal(result.bn1.running_var, net.bn1.running_var)
    _, sites, _ = recalibrate(net, batches, method=method, where=["bn1", "bn[23]"])
    assert codes(sites) == {"bn1": None, "bn2": None, "bn3": None}


def test_parameters_without_gradient_do_not_freeze_statistics() -> None:
    _, sites, _ = recalibrate(make(Plain).requires_grad_(False), split(images().double(), 5))
    assert set(codes(sites).values()) == {None}


class FrozenNorm(nn.Module):
    """As in torchvision: everything a buffer, applied by hand."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((3,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class InTrainMode(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.stats_mean, self.stats_var, training=True)


class Homeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = torch.zeros(3), torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.mean, self.var)


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_every_norm_that_is_left_has_its_reason(method: Any) -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(3), FrozenNorm(), InTrainMode(), Homeless(), nn.BatchNorm2d(3, track_running_stats=False)
    )
    net.unused = nn.BatchNorm2d(7)
    net.forward = lambda x: net[4](net[3](net[2](net[1](net[0](x)))))  # type: ignore[method-assign]
    result, sites, _ = recalibrate(_Calling(net), split(images(), 5), method=method)
    assert codes(sites) == {
        "net.0": None,
        "net.1": "BN303",
        "net.2.stats_mean": "BN304",
        "(unnamed)": "BN305",
        "net.4": "BN304",
        "net.unused": "BN302",
    }
    assert all(site.reason for site in sites if site.action == "left")
    assert torch.equal(result.net[2].stats_mean, torch.zeros(3))


class _Calling(nn.Module):
    """All children of a Sequential but `unused`, in order."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        del net.forward
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in self.net.named_children():
            if name != "unused":
                x = layer(x)
        return x


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_calls_without_values_leave_a_site_as_it_is(method: Any) -> None:
    class Empty(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.bn2(self.conv2(self.bn1(self.conv1(x)))[:0])
            return x

    net = make(Empty)
    result, sites, _ = recalibrate(net, split(images().double(), 5), method=method)
    assert codes(sites) == {"bn1": None, "bn2": "BN302"}
    assert torch.equal(result.bn2.running_mean, net.bn2.running_mean)


def test_an_iteration_that_does_not_settle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(schedules.solve.__kwdefaults__, "max_rounds", 2)
    _, sites, _ = recalibrate(make(Reused), split(images().double(), 5))
    assert codes(sites) == {"bn": "BN306", "bn_last": None}
    assert by_name(sites)["bn"].self_consistency > 1e-6
    assert by_name(sites)["bn_last"].self_consistency < 1e-12
