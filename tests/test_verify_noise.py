"""Rounding noise: what a saturated output is judged by, and that it hides no error."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import bnctl
from bnctl.data.batches import Batch
from bnctl.runtime.noise import rounding_noise
from bnctl.runtime.torch import TorchRunner
from bnctl.verification import compare_runners


class Saturated(nn.Module):
    """A sigmoid of about -16: values of 1e-7 with a resolution of 6e-8."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        nn.init.constant_(self.linear.weight, factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        return 0.5 * (1 + torch.tanh((logits - 16.0) / 2))


@pytest.fixture
def batch() -> Batch:
    return Batch((np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32),))


def test_noise_is_measured_on_the_baseline(batch: Batch) -> None:
    runner = TorchRunner(Saturated())
    noise = rounding_noise(runner, batch, runner.run(batch))
    assert 0 <= noise["out"] < 1e-6


def test_an_error_of_the_size_of_rounding_passes(batch: Batch) -> None:
    result = compare_runners(TorchRunner(Saturated()), TorchRunner(Saturated(1 + 2.0**-21)), [batch])
    assert result.max_rel_error > result.tolerance, "the case must need the allowance"
    assert result.passed


def test_negative_control_an_error_beyond_rounding_fails(batch: Batch) -> None:
    result = compare_runners(TorchRunner(Saturated()), TorchRunner(Saturated(1.5)), [batch])
    assert not result.passed
    assert result.outputs[0].noise is not None
    assert result.outputs[0].max_abs > 2 * result.outputs[0].noise


def test_a_well_scaled_output_is_not_given_the_allowance(batch: Batch) -> None:
    linear, off = nn.Linear(8, 8), nn.Linear(8, 8)
    off.load_state_dict(linear.state_dict())
    with torch.no_grad():
        off.weight *= 1.001
    assert not compare_runners(TorchRunner(linear), TorchRunner(off), [batch]).passed


class Magnified(nn.Module):
    """Small differences of large numbers: float32 keeps three digits of them."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.constant_(self.last.weight, 1.0)
        self.offset = nn.Parameter(torch.tensor(3e3))
        with torch.no_grad():
            self.last.weight += torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
            self.last.weight -= self.last.weight.mean(1, keepdim=True)
            self.last.weight *= factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x * 1e-3) + self.offset)


def test_an_error_that_float32_makes_itself_passes(batch: Batch) -> None:
    """Units in the last place of the input say nothing here: the rounding comes in behind it."""
    net = Magnified()
    runner = TorchRunner(net)
    values = runner.run(batch)
    reference = runner.in_float64()
    assert reference is not None
    own = float(np.abs(values["out"] - reference.run(batch)["out"]).max())
    noise = rounding_noise(runner, batch, values)["out"]
    assert noise >= own > 0
    assert next(net.parameters()).dtype == torch.float32, "the model itself stays as it is"


def test_layers_are_given_the_same_allowance(batch: Batch) -> None:
    from bnctl.verification import Verification, compare_layers

    passed = Verification(1, 1e-9, True, None)
    baseline, rounded, wrong = (TorchRunner(Magnified(f)) for f in (1.0, 1 + 2.0**-21, 1.5))
    assert compare_layers(baseline, rounded, batch, ["last"], passed).passed
    assert not compare_layers(baseline, wrong, batch, ["last"], passed).passed


def test_a_model_that_asks_for_float32_has_no_float64_reference(batch: Batch) -> None:
    class Stubborn(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(torch.float32))

    runner = TorchRunner(Stubborn(8, 8))
    assert rounding_noise(runner, batch, runner.run(batch))["out"] > 0


class Ranked(nn.Module):
    """Whole numbers that rounding decides on, or does not: the order of scores."""

    def __init__(self, gap: float, turned: bool = False) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.first.weight)
        noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        self.linear.weight.data = 1 + 2e-7 * noise
        self.gap = nn.Parameter(torch.arange(8.0) * gap)
        self.turned = turned

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.linear(self.first(x).relu()) + self.gap
        order = scores.argsort(dim=1, stable=True)
        return scores, order.flip(1) if self.turned else order


def test_whole_numbers_that_rounding_decides_on_are_no_evidence(batch: Batch) -> None:
    for gap, passes in ((0.0, True), (1.0, False)):
        result = compare_runners(TorchRunner(Ranked(gap)), TorchRunner(Ranked(gap, turned=True)), [batch])
        assert result.passed is passes


def test_bfloat16_inputs_of_models_that_differ() -> None:
    one = torch.nn.Sequential(torch.nn.Linear(4, 4)).bfloat16()
    other = copy.deepcopy(one)
    other[0].weight.data[0] += 1
    found = bnctl.verify(one, other, [torch.randn(3, 4).bfloat16()])
    assert not found.passed


class AsksForTheType(nn.Module):
    """Is another function in float64."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(8, 8), factor
        nn.init.eye_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y * (self.factor if y.dtype == torch.float32 else 5.0)


def test_another_function_in_float64_excuses_nothing(batch: Batch) -> None:
    torch.manual_seed(0)
    baseline = AsksForTheType()
    candidate = copy.deepcopy(baseline)
    candidate.factor = 1.5
    result = compare_runners(TorchRunner(baseline), TorchRunner(candidate), [batch])
    assert not result.passed
    assert result.outputs[0].noise is not None and result.outputs[0].noise < 1e-4


def test_a_graph_in_float64_keeps_its_hooks() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    graph.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(3, 4)
    reference = TorchRunner(graph).in_float64()
    assert reference is not None
    (wide,) = reference.run(Batch((x,))).values()
    np.testing.assert_allclose(wide, graph(x).detach().numpy(), rtol=1e-5)
