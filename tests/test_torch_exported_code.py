"""Affines in the code of exported graphs: one node stands for another, and all else stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn

import bnctl
from bnctl.engines.torch import readings
from bnctl.errors import EquivalenceError
from nets_traps import FrozenBN, Net, _fast, error, outputs, randomise  # noqa: F401
from test_torch_properties import networks

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")


def exported(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    """The model as a graph for any batch size."""
    x = torch.randn(2, 4, 8, 8) if x is None else x
    found = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b")},)).module()
    assert isinstance(found, fx.GraphModule)
    return found


class Frozen(nn.Module):
    """A FrozenBatchNorm, which is arithmetic in a graph, a scale per channel, and things around them."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 8, 3), FrozenBN(8)
        self.d, self.n = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.linspace(-1, 2, 8).view(8, 1, 1))
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.c(x)).relu_()
        x = self.n(self.d(x)) * self.scale
        first, second = self.drop(x).contiguous().split([3, 5], 1)
        x = torch.cat([first, second * 2.0], 1)
        x = x.view(x.shape[0], 8, -1).mean(-1)
        return self.head(x)  # type: ignore[no-any-return]


def arithmetic(graph_module: nn.Module) -> list[str]:
    assert isinstance(graph_module, fx.GraphModule)
    names = (
        str(node.target).split(".")[1]
        for node in graph_module.graph.nodes
        if node.op == "call_function" and "." in str(node.target)
    )
    return [name for name in names if name in {"mul", "add", "sub", "rsqrt", "batch_norm"}]


def assert_right(model: nn.Module, graph: nn.Module, **options: bool) -> Any:
    """Fold a graph of the model, with and without bnctl's check; the result, and a copy of it, compute what the model does."""
    x = torch.randn(2, 4, 8, 8)
    bnctl.fold(graph, x, **options)
    result = bnctl.fold(graph, x, verify=False, **options)
    for n in (2, 1, 5):
        other = torch.randn(n, 4, 8, 8)
        reference = outputs(model, other, torch.float64)
        for folded in (result.model, copy.deepcopy(result.model)):
            assert error(reference, [t.double() for t in outputs(folded, other)]) < 1e-5
    return result


def test_arithmetic_in_a_graph_is_folded() -> None:
    torch.manual_seed(0)
    model = randomise(Frozen())
    graph = exported(model)
    assert len(arithmetic(graph)) > 5
    result = assert_right(model, graph)
    assert {s.name: s.action for s in result.report.sites} == dict.fromkeys(("mul_2", "add_1", "n", "mul_3"), "folded")
    assert arithmetic(result.model) == ["mul"]  # by 2, of which there is one for some channels only
    assert any(node.name == "_guards_fn" for node in result.model.graph.nodes)


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    # name: (code, arithmetic that is left)
    "in place": (lambda s, x: s.c(x).mul_(s.v).add_(s.v).relu_(), 0),
    "another reader": (lambda s, x: (y := s.c(x)) * s.v + y.sigmoid(), 2),
    "a view that is written": (lambda s, x: _written(s.c(x)) * s.v, 1),
    "returned": (lambda s, x: ((y := s.c(x)) * s.v, y), 1),
    "into a layer behind": (lambda s, x: s.d(x.relu() * s.v + s.v), 0),
    "a size in between": (lambda s, x: (s.c(x) * s.v).view(x.shape[0], -1).tanh(), 0),
    "a number from a size": (lambda s, x: s.c(x) * s.v * x.shape[0], 1),
    "a number from a size, in between": (lambda s, x: s.c(x) * x.shape[0] + s.v, 2),
    "a number that is written": (lambda s, x: (s.c(x) * 0.5 + s.v) * s.v, 1),
    "a sum with nothing": (lambda s, x: (0 + s.c(x) + 0.0) * s.v, 0),
    "functional norm": (lambda s, x: F.batch_norm(s.c(x), s.m, s.w, s.g, s.v.view(-1)).relu(), 0),
    "parts": (lambda s, x: torch.cat([p * s.v[:2] for p in s.c(x).chunk(2, 1)], 1), 0),
    "a sum": (lambda s, x: (s.c(x) + s.e(x)) * s.v, 1),
    "two branches": (lambda s, x: s.c(x) * s.v + s.e(x) * s.g.view(4, 1, 1), 1),
}


def _written(y: Tensor) -> Tensor:
    y[:, :1].mul_(2)
    return y


class Coded(nn.Module):
    """Layers for any code."""

    def __init__(self, code: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.c, self.d, self.e = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.v = nn.Parameter(torch.linspace(0.5, 2, 4).view(4, 1, 1))
        self.g = nn.Parameter(torch.linspace(-1, 2, 4))
        self.register_buffer("m", torch.linspace(-1, 1, 4))
        self.register_buffer("w", torch.linspace(0.5, 2, 4))
        self.code = code

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


@pytest.mark.parametrize("name", CASES)
def test_code_of_all_kinds(name: str) -> None:
    torch.manual_seed(0)
    code, left = CASES[name]
    model = Coded(code).eval()
    result = assert_right(model, exported(model))
    assert len(arithmetic(result.model)) == left


def test_a_graph_inside_a_module_that_calls_it_twice() -> None:
    torch.manual_seed(0)
    inner = Coded(lambda s, x: s.d(F.pad(s.c(x) * s.v, (1, 1, 1, 1))).relu()).eval()
    graph = exported(inner)
    model = Net(lambda s, x: s.g(s.g(x)), g=inner)
    result = assert_right(model, Net(lambda s, x: s.g(s.g(x)), g=graph))
    assert [(s.name, s.action) for s in result.report.sites] == [("g.mul", "folded")]


class Branches(nn.Module):
    """A block of RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.p = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.b0, self.b1, self.b2 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.b0(self.c(x)) + self.b1(self.p(x)) + self.b2(x)).relu()  # type: ignore[no-any-return]


def test_branches_of_a_graph_are_merged() -> None:
    torch.manual_seed(0)
    model = randomise(Branches())
    result = assert_right(model, exported(model), merge_branches=True)
    assert not arithmetic(result.model)
    layers = [m for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    used = {str(n.target) for n in result.model.graph.nodes if n.op == "call_module"}
    assert sum(result.model.get_submodule(name) in layers for name in used) == 1


def test_symbolic_graphs_keep_their_arithmetic() -> None:
    torch.manual_seed(0)
    model = randomise(Frozen())
    model.head = nn.Identity()
    graph = fx.symbolic_trace(model)
    result = bnctl.fold(graph, torch.randn(2, 4, 8, 8))
    assert [(s.name, s.action) for s in result.report.sites] == [("n", "folded")]


def test_a_record_that_is_laid_beside_it_wrongly_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the value that a node made is taken for that of its neighbour."""
    torch.manual_seed(0)
    model = Coded(lambda s, x: (s.c(x) * s.v).relu()).eval()
    real = readings.nodes_of

    def shifted(*args: Any) -> dict[int, str] | None:
        names = real(*args)
        assert names is not None
        return {value: {"mul": "relu", "c": "mul"}.get(name, name) for value, name in names.items()}

    monkeypatch.setattr(readings, "nodes_of", shifted)
    with pytest.raises(EquivalenceError):
        bnctl.fold(exported(model), torch.randn(2, 4, 8, 8))


FACTORY = """
import torch
from test_torch_exported_code import Frozen, exported
from nets_traps import randomise

def build():
    torch.manual_seed(0)
    return exported(randomise(Frozen()))
"""


@pytest.mark.parametrize("output", ["o.pt2", "o.onnx", "o"])
def test_what_is_folded_can_be_written(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (tmp_path / "factory_of_graphs.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    source = ("factory_of_graphs:build", "--trust", "--input", "2x4x8x8")
    folded = cli("fold", *source, "-o", output)
    assert folded.code == 0, folded.err
    same = (
        cli("verify", "factory_of_graphs:build", output, *source[1:], "--factory", source[0])
        if output == "o"
        else cli("verify", source[0], output, *source[1:])
    )
    assert same.code == 0, same.err


def test_random_networks() -> None:
    tried = []

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(networks())
    def keeps(drawn: tuple[nn.Module, Tensor, Tensor]) -> None:
        model, x, other = drawn
        try:
            graph = exported(model, x)
        except Exception:  # torch.export has limits of its own
            return
        tried.append(len(arithmetic(graph)))
        folded = bnctl.fold(graph, x, verify=False, merge_branches=True).model
        for batch in (x, other):
            assert error(outputs(model, batch), outputs(folded, batch)) < 1e-9

    keeps()
    assert len(tried) > 5
    assert any(tried)


def test_a_write_that_nobody_reads_stays() -> None:
    """A graph that was edited by hand: one reader takes the tensor by the name that it had before it was written."""
    torch.manual_seed(0)
    model = Coded(lambda s, x: (lambda r: s.d(r) + s.e(r))(s.c(x).relu_()))
    model.e = nn.Conv2d(4, 4, 1)
    graph = exported(model.eval())
    nodes = {node.name: node for node in graph.graph.nodes}
    reader = next(
        node for node in nodes.values() if str(node.target) == "aten.conv2d.default" and "d_weight" in str(node.args)
    )
    write = next(node for node in nodes.values() if "relu_" in str(node.target))
    reader.replace_input_with(write, write.args[0])
    graph.recompile()
    assert_right(model, graph, merge_branches=True)


def test_a_strict_export_has_no_counter_of_batches() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 8, 8)
    graph = torch.export.export(model, (x,), strict=True).module()
    result = bnctl.fold(graph, x)
    assert [(s.name, s.action) for s in result.report.sites] == [("1", "left"), ("4", "folded")]
    assert not any(t.is_meta for t in (*result.model.buffers(), *result.model.parameters()))
    assert error(outputs(model, x, torch.float64), outputs(result.model, x)) < 1e-5
    assert bnctl.recalibrate(graph, [x]).report.summary["recalibrated"] == 2
