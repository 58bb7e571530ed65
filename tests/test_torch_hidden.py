"""Layers and weights that code gets at by other ways than the module tree's."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bnctl
from nets_traps import error, outputs, randomise


class Box:
    """An object of the user's own."""

    def __init__(self, *layers: nn.Module) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _both(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = bn(conv(x))
    return y


HIDDEN: dict[str, Any] = {
    "list": lambda conv, bn: [conv, bn],
    "tuple": lambda conv, bn: (conv, bn),
    "dict": lambda conv, bn: {0: conv, 1: bn},
    "partial": lambda conv, bn: functools.partial(_both, conv, bn),
    "object": Box,
    "method": lambda conv, bn: [conv, bn.forward],
}


class Hidden(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        object.__setattr__(self, "hidden", HIDDEN[how](self.conv, self.bn))

    def forward(self, x: Tensor) -> Tensor:
        if callable(self.hidden):
            return self.hidden(x).relu()
        return self.hidden[1](self.hidden[0](x)).relu()


@pytest.mark.parametrize("how", HIDDEN)
def test_a_layer_that_is_called_by_another_way_is_not_applied_twice(how: str) -> None:
    model = randomise(Hidden(how)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = outputs(model, x)
    result = bnctl.fold(model, x)
    assert [site.action for site in result.report.sites] == ["folded"]
    assert error(before, outputs(result.model, x)) < 1e-12
    assert error(before, outputs(copy.deepcopy(result.model), x)) < 1e-12
    file = io.BytesIO()
    torch.save(result.model, file)
    file.seek(0)
    assert error(before, outputs(torch.load(file, weights_only=False), x)) < 1e-12
    assert error(before, outputs(model, x)) == 0


class Normed(nn.Module):
    """A layer whose weight is computed, and code that reads that weight otherwise."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        self.layer = parametrizations.weight_norm(nn.Linear(6, 6))
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.layer(x)).relu()
        match self.read:
            case "product":
                return y + F.linear(x, self.layer.weight)
            case "sum":
                return y, self.layer.weight.sum()
            case "itself":
                return y, self.layer.weight
            case "transposed":
                return F.linear(y, self.layer.weight.t())
            case _:
                return y


@pytest.mark.parametrize("read", ["product", "sum", "itself", "transposed"])
def test_a_computed_weight_that_is_read_elsewhere_is_left(read: str) -> None:
    model = randomise(Normed(read))
    x = torch.randn(5, 6)
    before = outputs(model, x)
    result = bnctl.fold(model, x, verify=False)
    assert [site.code for site in result.report.sites] == ["BN108"]
    assert error(before, outputs(result.model, x)) == 0


def test_a_computed_weight_that_only_its_layer_reads_is_folded() -> None:
    model = randomise(Normed("not at all"))
    assert [site.action for site in bnctl.fold(model, torch.randn(5, 6)).report.sites] == ["folded"]


class Returned(nn.Module):
    """Hands out a parameter that a fold would change."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.norm, self.linear, self.bn = nn.LayerNorm(5), nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.matrix = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Any:
        match self.which:
            case "norm":
                return self.bn(self.norm(x)).relu(), self.norm.weight
            case "linear":
                return self.bn(self.linear(x)).relu(), self.linear.weight
            case _:
                return self.bn(x @ self.matrix).relu(), {"matrix": self.matrix}


@pytest.mark.parametrize(("which", "code"), [("norm", "BN103"), ("linear", "BN106"), ("matrix", "BN106")])
def test_a_parameter_that_the_model_returns_keeps_its_values(which: str, code: str) -> None:
    model = randomise(Returned(which)).requires_grad_(False)
    x = torch.randn(4, 5)
    before = outputs(model, x)
    result = bnctl.fold(model, x)
    assert [(site.action, site.code) for site in result.report.sites] == [("left", code)]
    assert error(before, outputs(result.model, x)) == 0


def test_a_norm_whose_scale_and_shift_are_one_parameter_takes_nothing_in() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.bn = nn.LayerNorm(5), nn.BatchNorm1d(5)
            self.norm.bias = self.norm.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.norm(x)).relu()  # type: ignore[no-any-return]

    result = bnctl.fold(randomise(One()), torch.randn(4, 5))
    assert [site.code for site in result.report.sites] == ["BN103"]
