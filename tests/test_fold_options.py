"""What fold may do, and how it says what it cannot: options, and the layer to blame where the function changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import bnctl
from bnctl.commands.bisect import bisect
from bnctl.errors import EquivalenceError, UsageError
from nets_traps import Net, error, outputs, randomise

Conv, BN = nn.Conv2d, nn.BatchNorm2d


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.data())
def test_bisect_finds_the_one_that_fails(count: int, data: Any) -> None:
    changes = [f"bn{i}" for i in range(count)]
    wrong = data.draw(st.sampled_from(changes))
    trials: list[Sequence[str]] = []

    def fails(part: Sequence[str]) -> bool:
        trials.append(part)
        return wrong in part

    assert bisect(changes, fails) == (wrong,)
    assert len(trials) <= 2 * np.ceil(np.log2(count + 1))


def test_bisect_where_only_two_together_fail() -> None:
    assert bisect("abcdefgh", lambda part: {"b", "g"} <= set(part)) == tuple("abcdefgh")
    assert bisect("abcdefgh", lambda part: {"e", "g"} <= set(part)) == tuple("efgh")
    assert bisect("", lambda part: True) == ()


def test_the_layer_to_blame_is_named() -> None:
    """A forward that reads an attribute of a layer that is gone afterwards: no rule can know."""

    def run(s: Any, x: Tensor) -> Tensor:
        for conv, norm in zip(s.convs, s.norms, strict=True):
            x = norm(conv(x)).relu()
        return x * s.norms[3].eps

    layers = {"convs": nn.ModuleList(Conv(3, 3, 1) for _ in range(6)), "norms": nn.ModuleList(BN(3) for _ in range(6))}
    net = randomise(Net(run, **layers))
    with pytest.raises(EquivalenceError, match=r"It is the fold of norms\.3 that does it") as raised:
        bnctl.fold(net, image())
    assert "--skip 'norms.3'" in str(raised.value.hint)
    result = bnctl.fold(net, image(), skip="norms.3")
    assert result.report.summary == {"found": 6, "folded": 5, "left": 1}


def test_tied_weights_are_left_where_that_is_asked_for() -> None:
    net = randomise(Net(lambda s, x: s.bn(s.a(x)) + s.b(x), a=Conv(3, 3, 1), b=Conv(3, 3, 1), bn=BN(3)))
    net.b.weight = net.a.weight
    untied = bnctl.fold(net, image())
    assert untied.report.summary == {"found": 1, "folded": 1, "left": 0, "added_parameters": 9}
    tied = bnctl.fold(net, image(), untie=False)
    assert [(s.action, s.code) for s in tied.report.sites] == [("left", "BN122")]
    assert tied.model.a.weight is tied.model.b.weight


class Siamese(nn.Module):
    """Two convolutions with one weight, before norms that are alike or not."""

    def __init__(self, alike: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = Conv(3, 4, 3, bias=bias), Conv(3, 4, 3, bias=bias)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.one = BN(4)
        self.two = self.one if alike else BN(4)
        randomise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(self.a(x)), self.two(self.b(x + 1))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_agree_stay_tied(bias: bool) -> None:
    model = Siamese(bias=bias)
    folded = bnctl.fold(model, image()).model
    assert folded.a.weight is folded.b.weight
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert error(outputs(model, image()), outputs(folded, image())) < 1e-5
    result = bnctl.fold(Siamese(alike=False, bias=bias), image())
    assert result.model.a.weight is not result.model.b.weight
    added = (
        sum(p.numel() for p in (result.model.a.weight, result.model.a.bias)) if bias else result.model.a.weight.numel()
    )
    assert result.report.summary["added_parameters"] == added


class Four(nn.Module):
    """The first layer keeps the weight, the second has another norm behind it, and the last two agree."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv(3, 3, 3, padding=1) for _ in range(4))
        for conv in self.convs:
            conv.weight = self.convs[0].weight
        self.one, self.two = BN(3), BN(3)
        randomise(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b, c, d = (conv(x) for conv in self.convs)
        return [a, self.one(b), self.two(c), self.two(d)]


def test_layers_that_agree_share_a_new_weight(tmp_path: Path) -> None:
    result = bnctl.fold(Four(), image())
    assert result.report.summary["added_parameters"] == 2 * 81
    result.save(tmp_path / "four", inputs=image(), factory="test_fold_options:Four")
    again = bnctl.load(tmp_path / "four", factory=Four)
    for model in (result.model, again):
        a, b, c, d = (conv.weight for conv in model.convs)
        assert c is d
        assert len({id(a), id(b), id(c)}) == 3
    assert error(outputs(result.model, image()), outputs(again, image())) == 0


def overridable() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 3, 1, 1)), **{k: rng.uniform(0.5, 1.5, 4) for k in ("g", "b", "m", "v")}}
    tensors = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])]
    inputs += [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.dims) for t in tensors]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"], "bn"),
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 8, 8])], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_defaults_of_inputs_are_constants_where_that_is_asked_for() -> None:
    model = overridable()
    left = bnctl.fold(model)
    assert [(s.action, s.code) for s in left.report.sites] == [("left", "BN112")]
    frozen = bnctl.fold(model, freeze_initializers=True)
    assert [s.action for s in frozen.report.sites] == ["folded"]
    assert [i.name for i in frozen.model.graph.input] == ["x"]
    assert frozen.report.verification["passed"]
    with pytest.raises(UsageError, match="--freeze-initializers is for ONNX files"):
        bnctl.fold(randomise(Net(lambda s, x: s.c(x), c=Conv(3, 3, 1))), image(), freeze_initializers=True)


def test_a_number_that_sizes_do_not_change_is_a_constant() -> None:
    """Numbers between the conv and the norm; see decision 0007 for those that are no constants."""
    net = randomise(Net(lambda s, x: s.bn(0.5 * s.c(x) - 3), c=Conv(3, 4, 1), bn=BN(4)))
    result = bnctl.fold(net, image())
    assert [s.action for s in result.report.sites] == ["folded"]
    assert error(outputs(net, image(1), torch.float64), outputs(result.model, image(1))) < 1e-5
    sized = randomise(Net(lambda s, x: s.bn(s.c(x) / x.shape[0]), c=Conv(3, 4, 1), bn=BN(4)))
    assert [s.code for s in bnctl.fold(sized, image()).report.sites] == ["BN116"]
    read = randomise(Net(lambda s, x: s.bn(s.c(x) * float(x.mean().sign())), c=Conv(3, 4, 1), bn=BN(4)))
    assert [s.code for s in bnctl.fold(read, image()).report.sites] == ["BN116"]


# --pad-exact


def padded(groups: int = 1, **options: Any) -> nn.Module:
    """Nothing linear before the norm, a padded convolution behind it."""
    return randomise(Net(lambda s, x: s.b(s.n(x.sigmoid())), n=BN(4), b=Conv(4, 4, 3, groups=groups, **options)))


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": "same"}, {"padding": 2, "stride": 2, "dilation": 2, "bias": False}]
)
def test_a_channel_of_ones_carries_the_shift(options: Any) -> None:
    net = padded(**options)
    with torch.no_grad():
        net.n.weight[0] = 0  # nothing is divided by a scale
    x = torch.randn(2, 4, 9, 9)
    assert [s.code for s in bnctl.fold(net, x).report.sites] == ["BN103"]
    result = bnctl.fold(net, x, pad_exact=True)
    assert [s.action for s in result.report.sites] == ["folded"]
    assert result.model.b.weight.shape == (4, 5, 3, 3)
    for other in (x, torch.randn(1, 4, 7, 12)):
        assert error(outputs(net, other, torch.float64), outputs(result.model, other)) < 1e-5
    again = bnctl.fold(result.model, x, pad_exact=True)
    assert again.report.summary == {"found": 0, "folded": 0, "left": 0}


def test_what_takes_no_channel_of_ones() -> None:
    x = torch.randn(2, 4, 9, 9)
    for net in (padded(groups=2, padding=1), padded(padding=1, padding_mode="reflect")):
        report = bnctl.fold(net, x, pad_exact=True).report
        assert error(outputs(net, x), outputs(bnctl.fold(net, x, pad_exact=True).model, x)) < 1e-5
        assert {s.action for s in report.sites} == ({"left"} if net.b.groups == 2 else {"folded"})
        assert "BN114" in str(report.sites[0].reason) or net.b.groups == 1
    twice = randomise(
        Net(lambda s, x: s.b(s.n(x.sigmoid())) + s.b(s.m(x.tanh())), n=BN(4), m=BN(4), b=Conv(4, 4, 3, padding=1))
    )
    assert {s.code for s in bnctl.fold(twice, x, pad_exact=True).report.sites} == {"BN103"}
    chain = randomise(Net(lambda s, x: s.b(s.m(s.n(x.sigmoid()))), n=BN(4), m=BN(4), b=Conv(4, 4, 3, padding=1)))
    result = bnctl.fold(chain, x, pad_exact=True)
    summary = {"found": 2, "folded": 2, "left": 0, "added_parameters": 4 * 9}  # one takes the other first
    assert result.report.summary == summary
    assert error(outputs(chain, x, torch.float64), outputs(result.model, x)) < 1e-5


@pytest.mark.parametrize("opset", [9, 17])
def test_a_channel_of_ones_in_onnx(opset: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 3, 3, 3)), **{k: rng.uniform(0.5, 1.5, 3) for k in ("g", "b", "m", "v")}}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("BatchNormalization", ["r", "g", "b", "m", "v"], ["n"], "bn"),
        helper.make_node("Conv", ["n", "w"], ["y"], "conv", pads=[1, 0, 1, 2], strides=[1, 2]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 8, 4])],
            [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    result = bnctl.fold(model, pad_exact=True)
    onnx.checker.check_model(result.model, full_check=True)
    assert [n.op_type for n in result.model.graph.node] == ["Relu", "Pad", "Conv"]
    assert result.report.verification["passed"]
    assert result.report.verification["max_rel_error"] < 1e-5


def test_a_bundle_with_a_channel_of_ones(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    (tmp_path / "pad_net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for output in ("out", "out.onnx", "out.pt2"):
        ended = cli("fold", "pad_net:build", "--input", "2x4x8x8", "-o", output, "--pad-exact", "--json")
        assert ended.code == 0, ended.err
        assert ended.document["summary"] == {"found": 1, "folded": 1, "left": 0}
    assert bnctl.load("out")(image().repeat(1, 2, 1, 1)[:, :4]).shape == (2, 4, 8, 8)
