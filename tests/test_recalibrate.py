"""Recalibration against naive references, on a real network too, and what is reported."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnctl.data.batches import Batch
from bnctl.engines.torch.recalibration import lockstep
from bnctl.engines.torch.recalibration.twins import Twins
from bnctl.numerics.moments import Moments
from bnctl.recalibration.statistics import Drift, count_dead, discrepancy, drift
from nets_resnet20 import build as build_resnet20
from torch_recalibration import (
    AGAIN,
    CIFAR,
    ONCE,
    SCHEDULES,
    Branchy,
    Heads,
    Plain,
    Residual,
    Stashing,
    by_name,
    error,
    images,
    inputs_of,
    make,
    norms,
    order_of_execution,
    recalibrate,
    reference,
    split,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- against the references


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [1, 5, 23])
@pytest.mark.parametrize("build", ONCE)
def test_exact_is_the_naive_reference(build: type[nn.Module], size: int, schedule: str) -> None:
    net, x = make(build), images().double()
    result, sites, samples = recalibrate(net, split(x, size), memory_bytes=SCHEDULES[schedule])
    assert error(result, reference(net, split(x, 23))) < 1e-11
    assert samples == 23
    assert [site.name for site in sites] == order_of_execution(net.eval(), split(x, 23))
    assert all(site.action == "recalibrated" and site.code is None for site in sites)
    assert all(site.self_consistency < 1e-12 for site in sites)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("build", AGAIN)
def test_exact_finds_the_fixed_point_of_norms_that_are_called_again(build: type[nn.Module], schedule: str) -> None:
    net, batches = make(build), split(images().double(), 3)
    result, sites, _ = recalibrate(net, batches, memory_bytes=SCHEDULES[schedule])
    assert error(result, reference(net, batches, sweeps=60)) < 1e-5
    assert all(site.code is None and site.self_consistency < 1e-6 for site in sites)


def test_branchy_batches_really_differ_in_order() -> None:
    orders = {tuple(order_of_execution(make(Branchy).eval(), [batch])) for batch in split(images().double(), 3)}
    assert {("bn_a", "bn_b", "bn", "bn_last"), ("bn_b", "bn_a", "bn", "bn_last")} <= orders
    assert any(order[0] == "bn_rare" for order in orders)


def test_calls_that_do_not_feed_themselves_are_exact() -> None:
    net, batches = make(Heads), split(images().double(), 7)
    result, sites, _ = recalibrate(net, batches)
    assert error(result, reference(net, batches, sweeps=3)) < 1e-11
    assert [site.calls for site in sites] == [12, 12]


@pytest.mark.parametrize("build", [*ONCE, *AGAIN])
def test_schedules_agree_in_single_precision(build: type[nn.Module]) -> None:
    net, batches = make(build, double=False), split(images(), 6)
    lockstep, _, _ = recalibrate(net, batches)
    passes, _, _ = recalibrate(net, batches, memory_bytes=0)
    assert error(lockstep, passes) < 1e-5
    again, _, _ = recalibrate(net, batches)
    assert all(torch.equal(a, b) for a, b in zip(lockstep.buffers(), again.buffers(), strict=True))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 23), max_size=5), st.sampled_from(ONCE))
def test_exact_does_not_depend_on_how_data_are_split(cuts: list[int], build: type[nn.Module]) -> None:
    net, x = make(build), images().double()
    parts = torch.tensor_split(x, sorted(cuts))
    result, _, _ = recalibrate(net, [Batch((part,)) for part in parts if len(part)])
    whole, _, _ = recalibrate(net, [Batch((x,))])
    assert error(result, whole) < 1e-11


def test_batch_is_the_naive_reference() -> None:
    """Norms in train mode, dropout off; by hand from what each norm is given."""
    net, batches = make(Plain), split(images().double(), 5)
    by_hand = copy.deepcopy(net).eval()
    for norm in norms(by_hand).values():
        norm.train()
    expected = {}
    for name in norms(by_hand):
        x = inputs_of(by_hand, name, batches)
        expected[name] = x.mean(1), x.var(1)
    result, sites, _ = recalibrate(net, batches, method="batch")
    for name, norm in norms(result).items():
        np.testing.assert_allclose(norm.running_mean, expected[name][0], rtol=1e-10)
        np.testing.assert_allclose(norm.running_var, expected[name][1], rtol=1e-10)
    assert sites[0].self_consistency < 1e-12  # nothing normalised before it
    assert sites[1].self_consistency > 1e-3  # small batches


@pytest.mark.usefixtures("probe_all")
def test_batch_self_consistency_is_what_the_eval_graph_produces() -> None:
    net, batches = make(Plain), split(images().double(), 5)
    result, sites, _ = recalibrate(net, batches, method="batch")
    x = inputs_of(result.eval(), "bn2", batches)
    norm = result.bn2
    shift = np.abs(norm.running_mean.numpy() - x.mean(1)) / np.sqrt(x.var(1) + norm.eps)
    spread = np.abs(norm.running_var.numpy() - x.var(1)) / (x.var(1) + norm.eps)
    assert sites[1].self_consistency == pytest.approx(max(shift.max(), spread.max()))


def test_methods_agree_on_one_batch() -> None:
    net, batches = make(Residual), split(images().double(), 23)
    exact, _, _ = recalibrate(net, batches)
    batch, _, _ = recalibrate(net, batches, method="batch")
    assert error(exact, batch) < 1e-10


@pytest.mark.parametrize("wrong", ["axis", "average of batches", "train mode"])
def test_the_reference_notices_wrong_statistics(wrong: str) -> None:
    """Negative controls: what today's tools do is far from the reference."""
    net, batches = make(Plain), split(images().double(), 22)  # 22 and 1
    good = reference(net, batches)
    bad = copy.deepcopy(good)
    if wrong == "axis":
        x = torch.cat([batch.args[0] for batch in batches])
        bad.bn1.running_mean.copy_(bad.conv1(x).mean((1, 2, 3))[:4].detach())
    elif wrong == "average of batches":
        means = [bad.conv1(batch.args[0]).mean((0, 2, 3)) for batch in batches]
        bad.bn1.running_mean.copy_(torch.stack(means).mean(0).detach())
    else:
        torch.manual_seed(0)
        torch.optim.swa_utils.update_bn([batch.args[0] for batch in batches], bad)
    assert error(bad, good) > 1e-2
    assert error(recalibrate(net, batches)[0], good) < 1e-11


def test_uneven_last_batch_weighs_by_its_size() -> None:
    """Trap 24: an average of batch means would give 4.5."""
    net = nn.Sequential(nn.BatchNorm1d(1))
    batches = [Batch((torch.zeros(8, 1),)), Batch((torch.full((1, 1), 9.0),))]
    result, _, _ = recalibrate(net, batches)
    assert result[0].running_mean.item() == pytest.approx(1.0)


def test_mean_much_larger_than_standard_deviation() -> None:
    x = 1e6 + 1e-2 * torch.randn(500, 2, dtype=torch.float64)
    result, _, _ = recalibrate(nn.BatchNorm1d(2).double(), split(x, 7))
    torch.testing.assert_close(result.running_var, x.var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("at_once", [0, 700])
def test_when_activations_are_looked_at_makes_no_difference(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once or together, in float32, where another order of sums would show."""
    net, batches = make(Residual, double=False), split(images(23), 5)
    together, _, _ = recalibrate(net, batches)
    monkeypatch.setattr(lockstep, "AT_ONCE", at_once)
    result, _, _ = recalibrate(net, batches)
    assert all(torch.equal(a, b) for a, b in zip(result.buffers(), together.buffers(), strict=True))


def test_forwards_in_lockstep_need_modules_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: batches that share a module overwrite what it keeps between its layers."""
    net, batches = make(Stashing), split(images(20).double(), 5)
    monkeypatch.setattr(Twins, "one", lambda twins: nullcontext(twins._model))
    assert error(recalibrate(net, batches)[0], reference(net, batches)) > 1e-3


# ---- what is reported


def test_drift_is_the_symmetric_divergence() -> None:
    rng = np.random.default_rng(0)
    before, after = (rng.normal(size=3), rng.random(3) + 0.5), (rng.normal(size=3), rng.random(3) + 0.5)

    def gaussian(statistics: tuple[np.ndarray, np.ndarray]) -> torch.distributions.Normal:
        mean, var = map(torch.from_numpy, statistics)
        return torch.distributions.Normal(mean, (var + 1e-3).sqrt())

    p, q = gaussian(before), gaussian(after)
    divergence = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    found = drift(before, after, 1e-3)
    assert found is not None
    assert (found.mean, found.max) == pytest.approx((divergence.mean().item(), divergence.max().item()))


def test_drift_of_channels_without_variance() -> None:
    still = (np.zeros(2), np.zeros(2))
    assert drift(still, still, 0.0) == Drift(0.0, 0.0)
    moved = drift(still, (np.ones(2), np.zeros(2)), 0.0)
    assert moved is not None
    assert np.isfinite(moved.max)


def test_discrepancy_is_in_units_of_the_layer() -> None:
    produced = np.array([1.0, 2.0]), np.array([4.0, 1.0])
    assert discrepancy((np.array([1.0, 2.0]), np.array([4.0, 1.0])), produced, 0.0) == 0
    assert discrepancy((np.array([1.5, 2.0]), np.array([4.0, 1.0])), produced, 0.0) == pytest.approx(0.25)
    assert discrepancy((np.array([1.0, 2.0]), np.array([4.0, 1.2])), produced, 0.0) == pytest.approx(0.2)


def test_dead_channels() -> None:
    assert count_dead(Moments(2, np.array([0.0, 1.0, 1.0]), np.array([0.0, 1e-20, 1.0])), 1e-7) == 2
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        net[0].weight[1] = 0
    _, sites, _ = recalibrate(net, split(images(), 5))
    assert sites[0].dead_channels == 1
    assert sites[0].count == 23 * 36
    assert sites[0].to_dict()["drift"].keys() == {"mean", "max"}


# ---- a real network


def shifted(file: Path, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images at 0.3 of their contrast, as the network takes them, and labels."""
    data = np.load(file)
    x = (data["x"][:samples] / 255 - 0.5) * 0.3 + 0.5
    x = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(x.transpose(0, 3, 1, 2)).float(), torch.from_numpy(data["y"][:samples])


@pytest.mark.usefixtures("probe_all")
def test_recalibration_recovers_accuracy_under_a_shift() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    if not CIFAR.is_dir():
        pytest.skip(f"{CIFAR} with the trained ResNet-20 is not here")
    net = build_resnet20().eval()
    missing = net.load_state_dict(safetensors.load_file(CIFAR / "resnet20_cifar10.safetensors"), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    x, y = shifted(CIFAR / "test.npz", 2000)
    calibration = split(shifted(CIFAR / "calibration.npz", 1000)[0], 128)

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            predictions = torch.cat([model(part).argmax(1) for part in x.split(500)])
        return (predictions == y).double().mean().item()

    assert accuracy(net) == pytest.approx(0.6775, abs=0.002)
    consistency = {}
    for method in ("exact", "batch"):
        result, sites, samples = recalibrate(net, calibration, method=method)
        assert samples == 1000
        assert len(sites) == 19
        assert 0.80 < accuracy(result) < 0.91
        consistency[method] = max(site.self_consistency for site in sites)
        assert by_name(sites)["bn1"].drift.max > 1
    assert consistency["exact"] < 1e-6 < consistency["batch"]
