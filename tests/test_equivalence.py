"""What one run on one example cannot show: numbers that Python computed from the input, and paths that the example did not take."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnctl
from bnctl.errors import EquivalenceError


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.between = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), between
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.between(self.conv(x), x))


class Branching(nn.Module):
    def __init__(self, other: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), other
        self.bn.running_mean.normal_()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.other(x) else self.bn(y)


@pytest.mark.parametrize(
    "between",
    [
        lambda y, x: y * x.shape[-1] ** -0.5,
        lambda y, x: y + x.shape[-1] / 4,
        lambda y, x: y / math.log(x.shape[-1] + 1),
        lambda y, x: y / (1 + float(x.abs().max())),
    ],
)
def test_numbers_from_the_input_are_not_constants(between: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Net(between)
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert [site.code for site in result.report.sites] == ["BN116"]
    x = 3 * torch.randn(1, 3, 20, 12)
    assert torch.allclose(result.model(x), model(x))


@pytest.mark.parametrize("other", [lambda x: x.shape[-1] > 16, lambda x: bool(x.mean() > 1)])
def test_a_path_that_the_example_did_not_take_is_refused(other: Callable[[Tensor], bool]) -> None:
    with pytest.raises(EquivalenceError):
        bnctl.fold(Branching(other), torch.randn(2, 3, 8, 8))


def test_reading_values_is_said() -> None:
    result = bnctl.fold(Branching(lambda x: bool(x.mean() > 1e9)), torch.randn(2, 3, 8, 8))
    assert any("reads values" in note for note in result.report.notes)


def test_the_given_model_is_left_alone_and_so_is_the_result() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(lambda y, x: y)
            self.register_buffer("calls", torch.zeros(1))
            self.n = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.n += 1
            return super().forward(x)

    model = Counting()
    result = bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert (model.n, float(model.calls)) == (0, 0.0)
    assert (result.model.n, float(result.model.calls)) == (0, 0.0)


def test_the_sum_of_a_value_with_itself() -> None:
    result = bnctl.fold(Net(lambda y, x: y + y), torch.randn(2, 3, 8, 8))
    assert [site.code for site in result.report.sites] == ["BN101"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_does_not_stop_the_rest() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.jit.trace(nn.ReLU(), torch.zeros(1))).eval()
    assert bnctl.fold(model, torch.randn(2, 3, 8, 8)).report.summary["folded"] == 1


def test_agreement_that_drowns_in_rounding_is_no_proof() -> None:
    class Chaos(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e9 * x)

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    assert not bnctl.verify(Chaos(), Nothing(), [torch.randn(6, 4)]).passed
