"""Rounding noise: what a saturated output is judged by, and that it hides no error."""

from __future__ import annotations

import copy
from collections.abc import Callable

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
    assert 0 <= noise["out"].moved < 1e-6


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
    noise = rounding_noise(runner, batch, values)["out"].moved
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
    assert rounding_noise(runner, batch, runner.run(batch))["out"].moved > 0


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


class Labels(nn.Module):
    """Whole numbers that rounding flips here and there."""

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.choose = nn.Conv2d(3, 5, 3, padding=1), choose
        self.half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.choose(self.conv(x))


def test_labels_that_rounding_flips_excuse_no_other_labels() -> None:
    x = Batch((torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).half(),))
    right = TorchRunner(Labels(lambda y: y.argmax(1)))
    noise = rounding_noise(right, x, right.run(x))["out"]
    assert 0 < noise.moved < 0.05, "the case must need the allowance"
    rounded = Labels(lambda y: y.argmax(1))
    with torch.no_grad():
        rounded.conv.weight *= 1 + 2.0**-10
    assert compare_runners(right, TorchRunner(rounded), [x]).passed
    for wrong in (lambda y: y.argmin(1), lambda y: y.argmax(1) + 1):
        assert not compare_runners(right, TorchRunner(Labels(wrong)), [x]).passed


def test_an_order_that_rounding_changes_a_little_excuses_no_other_order() -> None:
    class Order(nn.Module):
        def __init__(self, more: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.more = nn.Linear(16, 20_000), more

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).argsort(-1) + self.more

    x = Batch((torch.randn(2, 16),))
    assert compare_runners(TorchRunner(Order(0)), TorchRunner(Order(0)), [x]).passed
    assert not compare_runners(TorchRunner(Order(0)), TorchRunner(Order(1)), [x]).passed


class Counting(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(4, 4), factor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) * self.factor + self.count  # type: ignore[no-any-return]


def test_what_a_model_counts_is_no_rounding() -> None:
    batches = [Batch((torch.randn(2, 4),)) for _ in range(2)]
    assert compare_runners(TorchRunner(Counting(1.0)), TorchRunner(Counting(1.0)), batches).passed
    assert not compare_runners(TorchRunner(Counting(1.0)), TorchRunner(Counting(1.5)), batches).passed
    runner = TorchRunner(Counting(1.0))
    restore = runner.snapshot()
    values = runner.run(batches[0])
    assert rounding_noise(runner, batches[0], values, restore=restore)["out"].moved < 1e-5
    assert float(runner._module.count) == 1  # left as it was


def test_inputs_that_the_baseline_refuses_when_they_are_shaken() -> None:
    class Bounded(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.factor = nn.Linear(4, 4), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.max() > 1:
                raise ValueError("beyond 1")
            return (self.linear(x) * 3000 * self.factor).sin()

    x = Batch((torch.ones(2, 4),))
    assert compare_runners(TorchRunner(Bounded(1.0)), TorchRunner(Bounded(1.0)), [x]).passed
    assert not compare_runners(TorchRunner(Bounded(1.0)), TorchRunner(Bounded(1.1)), [x]).passed


def test_noise_of_values_that_are_no_numbers() -> None:
    runner = TorchRunner(nn.Linear(2, 2))
    noise = rounding_noise(runner, Batch((torch.ones(1, 2),)), {"out": np.array(["a", "b"], dtype=object)})
    assert noise["out"].moved == 0
