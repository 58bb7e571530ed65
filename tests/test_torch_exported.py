"""Graphs of torch.export and torch.fx as models, and as parts of models."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import bnctl
from bnctl.engines.torch.export import exported_axes
from bnctl.errors import ModelError
from nets_traps import error, outputs, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")

FACTORIES = """
import torch
from torch import nn

def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    nn.init.uniform_(model[1].running_mean)
    return model.eval()

def fixed():
    return torch.export.export(plain(), (torch.randn(2, 3, 8, 8),)).module()

def any_batch():
    return torch.export.export(plain(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("b")},)).module()

def symbolic():
    return torch.fx.symbolic_trace(plain())

def nested():
    other = torch.export.export(nn.ReLU(), (torch.randn(2, 3, 8, 8),)).module()
    model = nn.Sequential(other, fixed())
    for part in model.modules():
        part.training = False  # an exported graph has no train()
    return model
"""


class Scaled(nn.Module):
    """Multiplies by the batch size, which an export makes a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * x.shape[0]


def exported(model: nn.Module, *, any_batch: bool = False) -> fx.GraphModule:
    shapes = ({0: torch.export.Dim("b")},) if any_batch else None
    found = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes).module()
    assert isinstance(found, fx.GraphModule)
    return found


def test_a_graph_for_one_batch_size_goes_on_refusing_others() -> None:
    model = randomise(Scaled())
    folded = bnctl.fold(exported(model), torch.randn(2, 3, 8, 8)).model
    x = torch.randn(2, 3, 8, 8)
    assert error(outputs(model, x), outputs(folded, x)) < 1e-5
    with pytest.raises(AssertionError, match="Guard failed"):
        folded(torch.randn(5, 3, 8, 8))
    assert exported_axes(folded) == ((),)


def test_a_graph_for_any_batch_size_takes_others() -> None:
    model = randomise(Scaled())
    folded = bnctl.fold(exported(model, any_batch=True), torch.randn(2, 3, 8, 8)).model
    x = torch.randn(5, 3, 8, 8)
    assert error(outputs(model, x), outputs(folded, x)) < 1e-5
    assert exported_axes(folded) == ((0,),)
    assert exported_axes(model) is None


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nets_of_graphs.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_graphs", raising=False)
    return "nets_of_graphs"


@pytest.mark.parametrize("factory", ["fixed", "any_batch", "symbolic", "nested"])
@pytest.mark.parametrize("output", ["bundle", "m.pt2", "m.onnx"])
def test_a_folded_graph_is_written_and_read_back(cli, nets: str, factory: str, output: str) -> None:
    if factory == "nested":
        output = "bundle"  # the guards inside fix the batch size, which an export is to vary
    ended = cli("fold", f"{nets}:{factory}", "--input", "2x3x8x8", "-o", output, "--json")
    assert ended.code == 0, ended.err
    assert [site["action"] for site in ended.document["sites"]] == ["folded"]
    baseline = factory if factory == "nested" else "plain"  # which is made for one batch size, and does not say so
    assert cli("verify", f"{nets}:{baseline}", output, "--input", "2x3x8x8").code == 0


def test_hooks_of_a_graph_stay() -> None:
    model = fx.symbolic_trace(randomise(Scaled()))
    model.register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(2, 3, 8, 8)
    before = outputs(model, x)
    assert error(before, outputs(bnctl.fold(model, x).model, x)) < 1e-5


def test_a_script_module_is_not_exported(cli, nets: str, tmp_path: Path) -> None:
    (tmp_path / "nets_scripted.py").write_text(
        "import torch, warnings, nets_of_graphs\n"
        "def scripted():\n"
        "    warnings.simplefilter('ignore')\n"
        "    return torch.jit.script(nets_of_graphs.plain())\n"
    )
    ended = cli("export", "nets_scripted:scripted", "--input", "2x3x8x8", "-o", "m.onnx")
    assert ended.code == 2
    assert "it is a ScriptModule" in ended.err and "static-batch" not in ended.err


def test_data_in_batches_of_another_size_than_that_of_the_graph(cli, nets: str) -> None:
    np.savez("data.npz", x=np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32))
    given = (f"{nets}:fixed", "-o", "bundle", "--data", "data.npz")
    ended = cli("recalibrate", *given)
    assert ended.code == 2
    assert "--batch-size 2 makes such batches" in " ".join(ended.err.split())
    assert cli("recalibrate", *given, "--batch-size", "2").code == 2
    assert cli("recalibrate", *given, "--batch-size", "2", "--limit", "4").code == 0


def test_hooks_of_a_graph_are_not_left_out_of_what_is_exported(nets: str, tmp_path: Path) -> None:
    model = fx.symbolic_trace(randomise(Scaled()))
    model.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 3, 8, 8)
    result = bnctl.fold(model, x)
    for name in ("m.pt2", "m.onnx"):
        with pytest.raises(ModelError, match="would leave out the hooks"):
            result.save(tmp_path / name, inputs=x)
        assert not (tmp_path / name).exists()


def test_a_copy_that_loses_something_excuses_nothing() -> None:
    model = fx.symbolic_trace(randomise(Scaled()))
    model.factor = 2.0  # which copies of graphs lose
    model.register_forward_hook(lambda module, args, output: output * getattr(module, "factor", 1.0))
    with pytest.raises(ModelError, match=r"a copy of .* computes something else"):
        bnctl.fold(model, torch.randn(2, 3, 8, 8))
    assert not bnctl.verify(model, copy.deepcopy(model), [torch.randn(2, 3, 8, 8)]).passed


@pytest.mark.parametrize("root", [True, False])
def test_a_graph_with_a_forward_of_its_own_keeps_it(root: bool) -> None:
    graph = exported(randomise(Scaled()))
    inner = graph.forward
    graph.forward = lambda x: inner(x) * 2
    model = graph if root else nn.Sequential(nn.Identity(), graph)
    x = torch.randn(2, 3, 8, 8)
    before = outputs(graph, x)
    result = bnctl.fold(model, x)
    assert error(before, outputs(result.model, x)) < 1e-5


def test_a_graph_that_is_called_by_another_way_is_folded() -> None:
    class Holder(nn.Module):
        def __init__(self, graph: nn.Module) -> None:
            super().__init__()
            self.graph = graph
            self.hidden = [graph]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](x).relu()  # type: ignore[no-any-return]

    model = Holder(exported(randomise(Scaled())))
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    result = bnctl.fold(model, x)
    assert [site.action for site in result.report.sites] == ["folded"]
    assert error((before.detach(),), (result.model(x).detach(),)) < 1e-5
