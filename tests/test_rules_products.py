"""Products with a stored matrix, on either side and as an einsum: layers like any other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnctl
from bnctl.engines.onnx.lift import lift
from bnctl.engines.onnx.merge import apply_merges
from bnctl.graph.einsum import contraction
from bnctl.graph.ops import Linear, WeightLayout
from bnctl.plan.fold import plan_fold
from bnctl.plan.merge import plan_merge
from nets_traps import error, outputs, randomise
from test_onnx_checks import FREE, all_folded, codes, left, relative_error, run
from test_onnx_checks import Net as OnnxNet


class Product(nn.Module):
    """A BatchNorm, a product with a raw parameter, and another BatchNorm."""

    def __init__(self, equation: str, shape: tuple[int, int], norms: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.equation = equation
        self.before, self.after = norms
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.equation == "x @ W":
            x = x @ self.weight
        elif self.equation == "W @ x":
            x = self.weight @ x
        elif self.equation.startswith("W "):
            x = torch.einsum(self.equation[2:], self.weight, x)
        else:
            x = torch.einsum(self.equation, x, self.weight)
        return self.after(x).relu()


@pytest.mark.parametrize(
    ("equation", "shape", "rest"),
    [
        ("x @ W", (6, 4), ()),
        ("W @ x", (4, 6), (5,)),
        ("bc,cd->bd", (6, 4), ()),
        ("bc,dc->bd", (4, 6), ()),
        ("bc,cd", (6, 4), ()),
        ("...c,cd->...d", (6, 4), ()),
        ("bcl,dc->bdl", (4, 6), (5,)),
        ("W oi,bil->bol", (4, 6), (5,)),
        ("bchw, cd -> bdhw", (6, 4), (5, 3)),
    ],
)
def test_both_norms_go_into_the_matrix(equation: str, shape: tuple[int, int], rest: tuple[int, ...]) -> None:
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(rest)]
    model = randomise(Product(equation, shape, (norm(6), norm(4)))).double()
    batches = [torch.randn(n, 6, *rest, dtype=torch.float64) for n in (2, 1, 5)]
    references = [outputs(model, x) for x in batches]
    result = bnctl.fold(model, batches[0])
    assert [s.action for s in result.report.sites] == ["folded", "folded"]
    for reference, x in zip(references, batches, strict=True):
        assert error(reference, outputs(result.model, x)) < 1e-12
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in result.model.modules())


def test_two_products_in_one_code_have_a_bias_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
            self.norm1, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(x @ self.first).relu()
            return self.norm2(torch.einsum("bc,dc->bd", x, self.second)) + x

    model = randomise(Two()).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    reference = outputs(model, x)
    result = bnctl.fold(model, x)
    assert [s.action for s in result.report.sites] == ["folded", "folded"]
    assert error(reference, outputs(result.model, x)) < 1e-12


def test_a_matrix_that_is_also_multiplied_with_another_keeps_its_values() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.other = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x)).relu() + (self.other @ self.linear.weight).sum()

    model = randomise(Both()).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    (site,) = bnctl.fold(model, x).report.sites
    assert (site.action, site.code) == ("left", "BN106")
    assert site.reason is not None and "aten.matmul" in site.reason


@pytest.mark.parametrize(
    "equation",
    [
        "bc,ce->be,",  # three terms
        "bc,bc->b",  # no axis of its own
        "bcd,cd->b",  # two in common
        "bc,cd->db",  # channels move
        "bcl,cd->bld",
        "bc,cd->bcd",  # nothing is summed
        "bcc,cd->bd",
        "c...,cd->d...",  # how many axes are behind is not said
        "bc,...d->bd",
    ],
)
def test_equations_that_say_something_else(equation: str) -> None:
    assert contraction(equation, 1) is None


@pytest.mark.parametrize(
    ("equation", "stored", "spatial", "out_first"),
    [("ab,bc", 1, 0, False), ("ab,cb", 1, 0, True), ("oi,bil->bol", 0, 1, True), ("...c,dc->...d", 1, 0, True)],
)
def test_equations_that_are_layers(equation: str, stored: int, spatial: int, out_first: bool) -> None:
    assert contraction(equation, stored) == Linear(WeightLayout(out_first=out_first), spatial=spatial)


# name: (shape behind the batch, product of a value)
PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[OnnxNet, str], str]]] = {
    "on its right": ((6,), lambda net, x: net.add("MatMul", x, net.normal(6, 4))),
    "on its left": ((6, 5), lambda net, x: net.add("MatMul", net.normal(4, 6), x)),
    "einsum": ((6,), lambda net, x: net.add("Einsum", x, net.normal(4, 6), equation="bc,dc->bd")),
    "einsum, implicit": ((6,), lambda net, x: net.add("Einsum", x, net.normal(6, 4), equation="bc, cd")),
    "einsum over a sequence": (
        (6, 5),
        lambda net, x: net.add("Einsum", net.normal(4, 6), x, equation="oi,bil->bol"),
    ),
    "einsum over an image": (
        (6, 5, 3),
        lambda net, x: net.add("Einsum", x, net.normal(6, 4), equation="bchw,cd->bdhw"),
    ),
}


@pytest.mark.parametrize("bias", ["none", "vector", "number"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_onnx_products(name: str, bias: str) -> None:
    shape, product = PRODUCTS[name]
    net = OnnxNet(FREE, *shape)
    v = product(net, net.bn("x", 6, out="first"))
    if bias != "none":
        v = net.add("Add", v, net.normal(*((4,) if bias == "vector" else (1,)), *[1] * (len(shape) - 1)))
    all_folded(net, net.add("Relu", net.bn(v, 4, out="second")))


def test_onnx_products_that_are_added_to_something_else() -> None:
    net = OnnxNet(FREE, 6, 5)
    v = net.add("MatMul", net.normal(4, 6), "x")
    v = net.add("Add", v, net.normal(5))  # along the other axis
    left(net, "BN110", net.bn(v, 4, out="norm"))


def test_onnx_products_on_the_left_of_an_unknown_rank() -> None:
    net = OnnxNet(FREE, 6, 5)
    model = net.model(net.bn(net.add("MatMul", net.normal(4, 6), "x"), 4, out="norm"))
    model.graph.inputs[0].shape = None
    assert set(codes(plan_fold(lift(model).graph)).values()) == {"BN116"}


def test_onnx_products_are_merged_where_they_sum_over_the_same_axis() -> None:
    net = OnnxNet(FREE, 6, 6)
    one, two = (net.add("MatMul", net.normal(6, 6), "x") for _ in range(2))
    other = net.add("MatMul", "x", net.normal(6, 6))
    model = net.model(net.add("Add", net.add("Add", one, other), two, out="y"))
    before = run(model, {"x": np.ones((2, 6, 6), np.float32)})["y"]
    lifted = lift(model)
    merges = plan_merge(lifted.graph)
    assert [merge.names for merge in merges] == [("n_v1",)]
    merged = apply_merges(lifted, merges)
    assert [node.op_type for node in merged.graph].count("MatMul") == 2
    assert relative_error(before, run(merged, {"x": np.ones((2, 6, 6), np.float32)})["y"]) < 1e-6
