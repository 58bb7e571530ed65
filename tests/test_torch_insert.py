"""Insertion into torch models, bundles of them, and exported graphs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnctl
from bnctl.engines.torch.copies import workable
from bnctl.engines.torch.layers import LastAxisBatchNorm
from bnctl.errors import DataError, ModelError
from bnctl.models.model import Model
from bnctl.models.origin import Origin
from nets_traps import FunctionalBN, Net, _fast, error, outputs, randomise  # noqa: F401

Conv, Lin, BN = nn.Conv2d, nn.Linear, nn.BatchNorm2d


class Small(nn.Module):
    """A user's class; `tied` lets two convolutions share a weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a, self.bn, self.b = Conv(3, 4, 3, bias=False), BN(4), Conv(4, 4, 3, padding=1)
        self.c, self.fc = Conv(4, 4, 3, padding=1), Lin(4, 2)
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.a(x)).relu()
        x = self.c(self.b(x).relu()).relu()
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def image(batch: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(batch))


def codes(result: Any) -> dict[str, str]:
    return {s.name: s.code or s.action for s in result.report.sites}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# 21, 22, 23


def test_trap_21_default_bn_is_not_the_identity_and_gamma_is_sqrt_var_plus_eps() -> None:
    model = randomise(Small())
    model.fc.bias.data.zero_()  # type: ignore[union-attr, operator]
    result = bnctl.insert(model, [image(), image(2)], eps=0.1)
    assert codes(result) == {"a": "BN201", "b": "inserted", "c": "inserted", "fc": "BN202"}
    x = image(3)
    assert error(outputs(model, x, torch.float64), outputs(result.model, x)) < 2e-5
    for wrong_gamma in (torch.ones(4), result.model.b.norm.running_var.sqrt()):
        wrong = copy.deepcopy(result.model)
        wrong.b.norm.weight.data = wrong_gamma
        assert error(outputs(model, x, torch.float64), outputs(wrong, x)) > 1e-2


def test_trap_22_one_value_per_channel_and_near_constant_channels() -> None:
    net = Net(lambda s, x: s.d(s.c(x).relu().flatten(1)), c=Conv(3, 4, 8), d=Lin(4, 2)).eval()
    assert codes(bnctl.insert(net, [image(1)]))["c"] == "BN207"
    assert codes(bnctl.insert(net, [image(1), image(2)]))["c"] == "inserted"
    net.c.weight.data[0] = 0
    result = bnctl.insert(net, [image(4)])
    assert any("BN208" in note for note in result.report.notes)
    assert {s.name: s.details.get("quiet_channels") for s in result.report.sites}["c"] == 1


def test_trap_23_reused_modules_forks_and_names() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.c(s.c(x).relu()).relu()
        return s.d(y).relu().mean((2, 3)) @ s.w + s.e(y).sigmoid().mean((2, 3))

    net = Net(run, c=Conv(4, 4, 3), d=Conv(4, 4, 1), e=Conv(4, 4, 1), w=nn.Parameter(torch.randn(4, 4))).eval()
    net.e.weight = net.d.weight
    before = copy.deepcopy(net.state_dict())
    result = bnctl.insert(net, [image(channels=4)])
    after = result.model.state_dict()
    assert codes(result)["c"] == codes(result)["d"] == "inserted"
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert list(net.state_dict()) == list(before)
    assert error(outputs(net, image(3, 4), torch.float64), outputs(result.model, image(3, 4))) < 2e-5


def test_trap_23_inserting_twice_is_noticed() -> None:
    once = bnctl.insert(randomise(Small()), [image()])
    assert set(codes(bnctl.insert(once.model, [image()])).values()) <= {"BN201", "BN202"}


# Placement


def test_placement_through_pool_add_and_flatten() -> None:
    net = Net(
        lambda s, x: s.f((F.max_pool2d(s.a(x), 2) + F.max_pool2d(s.b(x), 2)).flatten(1).relu()),
        a=Conv(3, 4, 3),
        b=Conv(3, 4, 3),
        f=Lin(36, 2),
    ).eval()
    assert codes(bnctl.insert(net, [image()])) == {"a": "inserted", "b": "inserted", "f": "BN202"}


def test_where_skip_and_exact_names() -> None:
    net = Net(lambda s, x: s.c(s.b(s.a(x).relu())), a=Conv(3, 4, 3), b=Conv(4, 4, 1), c=Conv(4, 4, 1)).eval()
    assert codes(bnctl.insert(net, [image()])) == {"a": "inserted", "b": "BN203", "c": "BN202"}
    assert codes(bnctl.insert(net, [image()], where="b")) == {"a": "BN204", "b": "inserted", "c": "BN204"}
    assert codes(bnctl.insert(net, [image()], where="[ab]"))["b"] == "BN203"
    assert codes(bnctl.insert(net, [image()], skip="a"))["a"] == "BN204"
    with pytest.raises(bnctl.errors.UsageError, match="no layer matches"):
        bnctl.insert(net, [image()], where="nothing.*")


def test_linear_of_rank_three_and_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = Net(lambda s, x: s.head(s.l(x)), l=layer, head=Lin(8, 2)).eval()
    data = [torch.randn(3, 5, 8), torch.randn(2, 5, 8)]
    result = bnctl.insert(net, data)
    found = codes(result)
    assert found["l.linear1"] == "inserted"
    assert found["l.self_attn"] == "BN206"
    assert isinstance(result.model.l.linear1.norm, LastAxisBatchNorm)
    assert error(outputs(net, data[0], torch.float64), outputs(result.model, data[0])) < 2e-5
    back = bnctl.fold(result.model, data[0])
    assert set(back.model.state_dict()) == set(net.state_dict())
    assert error(outputs(net, data[1], torch.float64), outputs(back.model, data[1])) < 2e-5


# Bundles


def test_bundle_of_an_insertion_trains_and_folds_back(tmp_path: Path) -> None:
    model = randomise(Small())
    inserted = bnctl.insert(model, [image()])
    inserted.save(tmp_path / "inserted", factory="test_torch_insert:Small")
    loaded = bnctl.load(tmp_path / "inserted", factory=Small)
    assert type(loaded) is Small
    assert set(model.state_dict()) < set(loaded.state_dict())
    assert error(outputs(inserted.model, image(2)), outputs(loaded, image(2))) == 0
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    F.cross_entropy(loaded(image()), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert int(loaded.b.norm.num_batches_tracked) == 1  # type: ignore[union-attr, arg-type]
    assert not torch.equal(loaded.b.weight, model.b.weight)  # type: ignore[union-attr, arg-type]


def test_bundle_of_a_fold_with_a_tied_weight(tmp_path: Path) -> None:
    model = randomise(Small(tied=True))
    inserted = bnctl.insert(model, [image()], where="b").model
    inserted.b.norm.weight.data *= -1.5
    opened = Model(
        "torch",
        inserted,
        "m",
        origin=Origin(
            "x:y", {}, ({"edit": "insert", "module": "b", "norm": "BatchNorm2d", "features": 4, "eps": 1e-5},)
        ),
    )
    result = bnctl.fold(opened, image())
    assert codes(result) == {"bn": "folded", "b.norm": "folded"}
    assert result.report.summary["added_parameters"] == model.b.weight.numel()
    result.save(tmp_path / "folded")
    loaded = bnctl.load(tmp_path / "folded", factory=lambda: Small(tied=True))
    assert loaded.b.weight is not loaded.c.weight  # type: ignore[union-attr]
    for x in (image(), image(3)):
        assert error(outputs(inserted, x, torch.float64), outputs(loaded, x)) < 2e-5


# Exported graphs


def exported(model: nn.Module, x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (x,)).module()


def test_exported_graph_folds_and_keeps_its_names() -> None:
    model = randomise(Small())
    graph = exported(model, image())
    result = bnctl.fold(graph, image())
    assert codes(result) == {"bn": "folded"}
    assert set(result.model.state_dict()) == ({k for k in model.state_dict() if not k.startswith("bn.")} | {"a.bias"})
    assert error(outputs(model, image(), torch.float64), [result.model(image()).detach().double()]) < 2e-5


def test_exported_graph_takes_norms() -> None:
    model = randomise(Small())
    result = bnctl.insert(exported(model, image()), [image()])
    assert codes(result) == {"a": "BN201", "b": "inserted", "c": "inserted", "fc": "BN202"}
    assert set(model.state_dict()) < set(result.model.state_dict())
    assert error(outputs(model, image(), torch.float64), [result.model(image()).detach().double()]) < 2e-5


def test_functional_norm_in_an_exported_graph_is_left() -> None:
    model = Net(lambda s, x: s.f(x), f=FunctionalBN()).eval()
    graph = exported(model, image())
    assert type(workable(graph, "graph")).__name__.endswith("Module")
    assert codes(bnctl.fold(graph, image())) == {"f": "BN118"}


class Counting(nn.Module):
    """Counts its calls, in a buffer or in a parameter."""

    def __init__(self, parameter: bool) -> None:
        super().__init__()
        self.c, self.d, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        if parameter:
            self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)
        else:
            self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.bn(self.d(self.c(x).relu()))


def test_a_model_that_counts_its_calls_is_left_where_it_was() -> None:
    model = Counting(parameter=False).eval()
    for result in (bnctl.insert(model, [torch.randn(2, 3, 8, 8)] * 3), bnctl.fold(model, torch.randn(2, 3, 8, 8))):
        assert result.model.calls == model.calls == 0


def test_a_model_that_writes_into_its_parameters_is_refused_before_that_is_done() -> None:
    model = Counting(parameter=True).eval()
    for surgery in (bnctl.fold, lambda model, x: bnctl.insert(model, [x])):
        with pytest.raises(ModelError, match="writes into its parameter calls"):
            surgery(model, torch.randn(2, 3, 8, 8))
    assert model.calls == 0


def test_a_batch_that_does_not_run_is_named() -> None:
    from bnctl.data.batches import Batch
    from bnctl.engines.torch.calibrate import output_moments

    batches = [Batch((torch.randn(2, 4),)), Batch((torch.randn(2, 5),))]
    with pytest.raises(DataError, match="batch 1 does not run through the model: RuntimeError"):
        output_moments(nn.Sequential(nn.Linear(4, 4)), {"0": -1}, batches)


class WithNorm(nn.Linear):
    """A layer that has something called norm already."""

    def __init__(self, own: Any) -> None:
        super().__init__(5, 8)
        self.norm = own

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.norm is None else self.norm(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("own", [None, nn.Identity(), nn.Dropout(0.5)])
def test_a_layer_with_a_norm_of_its_own_keeps_it(own: Any) -> None:
    model = nn.Sequential(WithNorm(own), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    result = bnctl.insert(model, [torch.randn(6, 5)])
    found = {site.name: (site.action, site.code) for site in result.report.sites}
    assert found["0"] == ("left", "BN206")
    assert found["2"] == ("inserted", None)
    assert type(result.model[0].norm) is type(own)


def test_a_traced_graph_keeps_its_modes() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)).train()
    graph = torch.fx.symbolic_trace(plain)
    graph.get_submodule("2").eval()
    data = [torch.randn(4, 3, 12, 12)]
    result = bnctl.insert(graph, data).model
    assert result.training and result.get_submodule("0").training
    assert not result.get_submodule("2").training
