"""`--merge-branches`: parallel linear operators that are summed become one, on both engines."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import bnctl
from bnctl.engines.onnx.engine import OnnxEngine
from bnctl.engines.torch.record import record
from bnctl.graph.window import Window
from bnctl.models.importing import import_module
from bnctl.models.model import Model
from conftest import faults
from nets_traps import Net, error, outputs, randomise

Conv, BN = nn.Conv2d, nn.BatchNorm2d


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def image(batch: int = 2, channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size)


def operators(model: nn.Module, x: Tensor) -> list[str]:
    """The operators that run, by name, without activations of memory."""
    return [call.op.split(".")[1] for call in record(model, (x,)).ops]


def merged(model: nn.Module, x: Tensor, expected: list[str], **options: Any) -> nn.Module:
    """Merge, hold it against the float64 model on several inputs, and against the operators that should be left."""
    randomise(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    others = (x, x[:1], torch.randn(3, *x.shape[1:-1], x.shape[-1] + (4 if x.ndim == 4 else 0)))
    references = [outputs(model, i, torch.float64) for i in others]
    result = bnctl.fold(model, x, merge_branches=True, **options)
    for inputs, reference in zip(others, references, strict=True):
        assert error(reference, outputs(result.model, inputs)) < 2e-5
        assert error(reference, outputs(result.model, inputs, torch.float64)) < 5e-6
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert operators(result.model, x) == expected
    return result.model


class RepBlock(nn.Module):
    """As RepVGG: a 3x3 and a 1x1 convolution and the identity, each with its BatchNorm."""

    def __init__(self, width: int = 4, groups: int = 1) -> None:
        super().__init__()
        self.c3, self.b3 = Conv(width, width, 3, padding=1, bias=False, groups=groups), BN(width)
        self.c1, self.b1 = Conv(width, width, 1, bias=False, groups=groups), BN(width)
        self.b0 = BN(width)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b3(self.c3(x)) + self.b1(self.c1(x)) + self.b0(x)).relu()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_three_branches_with_their_norms(groups: int) -> None:
    net = Net(lambda s, x: s.two(s.one(x)), one=RepBlock(groups=groups), two=RepBlock(groups=groups))
    model = merged(net, image(), ["conv2d", "relu", "conv2d", "relu"])
    assert isinstance(model.one, RepBlock)


def test_report_names_what_was_merged() -> None:
    result = bnctl.fold(randomise(Net(lambda s, x: s.one(x), one=RepBlock())), image(), merge_branches=True)
    actions = {s.name: (s.action, s.into) for s in result.report.sites}
    assert actions == {
        "one.b3": ("folded", ("one.c3",)),
        "one.b1": ("folded", ("one.c1",)),
        "one.b0": ("folded", ("one.c3",)),
        "one.c1": ("merged", ("one.c3",)),
    }
    assert result.report.summary == {"found": 3, "folded": 3, "left": 0, "merged": 1}
    plain = bnctl.fold(randomise(Net(lambda s, x: s.one(x), one=RepBlock())), image())
    assert plain.report.summary == {"found": 3, "folded": 2, "left": 1}


@pytest.mark.parametrize(
    ("code", "layers", "expected"),
    [
        (lambda s, x: s.a(x) + s.b(x) + s.c(x), {"a": Conv(4, 6, (1, 3), padding=(0, 1)), "b": Conv(4, 6, (3, 1), padding=(1, 0)),
                                                "c": Conv(4, 6, 3, padding=1)}, ["conv2d"]),
        (lambda s, x: s.a(x) - s.b(x), {"a": Conv(4, 6, 1), "b": Conv(4, 6, 5, padding=2)}, ["conv2d"]),
        (lambda s, x: s.a(x) - s.b(x), {"a": Conv(4, 6, 5, padding=2), "b": Conv(4, 6, 1)}, ["conv2d"]),
        (lambda s, x: s.a(x) - x, {"a": Conv(4, 4, 3, padding=1)}, ["conv2d"]),
        (lambda s, x: (s.a(x) + x.relu()) + s.b(x), {"a": Conv(4, 4, 3, padding=1), "b": Conv(4, 4, 1)}, ["conv2d", "relu", "add"]),
        (lambda s, x: s.a(x) + s.b(x), {"a": Conv(4, 6, 3, stride=2, padding=1), "b": Conv(4, 6, 1, stride=2)}, ["conv2d"]),
        (lambda s, x: s.a(x) + s.b(x), {"a": Conv(4, 6, 3, dilation=2, padding=2), "b": Conv(4, 6, 5, dilation=2, padding=4)}, ["conv2d"]),
        (lambda s, x: s.a(x) + s.b(x), {"a": Conv(4, 6, 3, padding="same"), "b": Conv(4, 6, 5, padding="same")}, ["conv2d"]),
        (lambda s, x: s.a(x) + s.b(x), {"a": Conv(4, 6, 3), "b": Conv(4, 6, 3)}, ["conv2d"]),
        (lambda s, x: (y := s.a(x)) + s.b(y), {"a": Conv(4, 4, 1), "b": Conv(4, 4, 3, padding=1)}, ["conv2d", "conv2d"]),
    ],
    ids=["ACNet", "the larger one is subtracted", "the smaller one is subtracted", "minus identity", "of three the two that fit", "stride", "dilation", "same",
         "no padding", "identity of an inner value"],
)  # fmt: skip
def test_kernels(code: Any, layers: dict[str, nn.Module], expected: list[str]) -> None:
    merged(Net(code, **layers), image(), expected)


@pytest.mark.parametrize(
    ("code", "layers", "expected"),
    [
        (lambda s, x: s.a(x) + s.b(x), {"a": Conv(4, 4, 3, padding=1), "b": Conv(4, 4, 1, groups=2)}, ["conv2d", "conv2d", "add"]),
        (lambda s, x: s.a(x) + s.b(x), {"a": Conv(4, 6, 3, dilation=2, padding=2), "b": Conv(4, 6, 3, padding=1)}, ["conv2d", "conv2d", "add"]),
        (lambda s, x: s.a(x) + s.b(x.relu()), {"a": Conv(4, 4, 3, padding=1), "b": Conv(4, 4, 3, padding=1)}, ["conv2d", "relu", "conv2d", "add"]),
        (lambda s, x: (y := s.a(x)) + s.b(x) + y.relu(), {"a": Conv(4, 4, 3, padding=1), "b": Conv(4, 4, 1)}, ["conv2d", "conv2d", "add", "relu", "add"]),
        (lambda s, x: s.a(s.a(x)) + s.a(x), {"a": Conv(4, 4, 3, padding=1)}, ["conv2d", "conv2d", "conv2d", "add"]),
        (lambda s, x: s.a(x) + x * x.shape[-1], {"a": Conv(4, 4, 3, padding=1)}, ["conv2d", "mul", "add"]),
        (lambda s, x: s.a(x) + s.b(x), {"a": Conv(4, 4, 3, padding=1), "b": Conv(4, 1, 1)}, ["conv2d", "conv2d", "add"]),
        (lambda s, x: s.a(x) + s.b(x), {"a": nn.ConvTranspose2d(4, 4, 3, padding=1), "b": Conv(4, 4, 1)}, ["conv_transpose2d", "conv2d", "add"]),
    ],
    ids=["other groups", "other dilation", "other source", "another reader", "shared", "a number from a shape", "broadcast", "transposed"],
)  # fmt: skip
def test_what_is_left(code: Any, layers: dict[str, nn.Module], expected: list[str]) -> None:
    merged(Net(code, **layers), image(), expected)


def test_linear_layers() -> None:
    net = Net(lambda s, x: s.a(x) + s.b(x) + x, a=nn.Linear(4, 4), b=nn.Linear(4, 4, bias=False))
    merged(net, torch.randn(2, 5, 4), ["linear"])


def test_norm_behind_the_sum_and_sums_of_sums() -> None:
    """RepViT: a norm behind a sum with the identity folds only once the sum is one convolution; RepMixer: a sum of what was merged."""
    inner = Net(
        lambda s, x: s.bn(s.a(x) + s.b(x) + x),
        a=Conv(4, 4, 3, padding=1, groups=4),
        b=Conv(4, 4, 1, groups=4),
        bn=BN(4),
    )
    net = Net(
        lambda s, x: x + s.gamma * (s.inner(x) - s.norm(x)),
        inner=inner,
        norm=BN(4),
        gamma=nn.Parameter(torch.rand(4, 1, 1)),
    )
    merged(net, image(), ["conv2d"])


def test_in_place_additions_and_zeros_to_begin_with() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        out: Any = 0
        for branch in (s.a, s.b, s.c):
            out += branch(x)
        out += x
        return out.relu_()

    net = Net(lambda s, x: s.block(x * s.one), one=nn.Parameter(torch.tensor([[[1.5]], [[-1.0]], [[2.0]], [[0.3]]])),
              block=Net(run, a=Conv(4, 4, 3, padding=1), b=BN(4), c=Conv(4, 4, 1)))  # fmt: skip
    merged(net, image(), ["conv2d", "relu_"])


def test_a_hook_on_a_branch_keeps_the_block_as_it_is() -> None:
    block = RepBlock()
    seen: list[Tensor] = []
    block.c1.register_forward_hook(lambda module, args, output: seen.append(output))
    merged(
        Net(lambda s, x: s.one(x), one=block),
        image(),
        ["conv2d", "conv2d", "batch_norm", "add", "batch_norm", "add", "relu"],
    )


def test_computed_weights_are_merged_too() -> None:
    net = Net(lambda s, x: s.a(x) + s.b(x), a=nn.utils.parametrizations.weight_norm(Conv(4, 4, 3, padding=1, bias=False)),
              b=nn.utils.parametrizations.weight_norm(Conv(4, 4, 1)))  # fmt: skip
    merged(net, image(), ["conv2d"])


def test_half_precision_overflow_is_refused() -> None:
    net = Net(lambda s, x: s.a(x) + s.b(x), a=Conv(4, 4, 1), b=Conv(4, 4, 1)).half()
    for conv in (net.a, net.b):
        nn.init.constant_(conv.weight, 6e4)
    with pytest.raises(bnctl.errors.OverflowInFoldError, match="a: its new parameters"):
        bnctl.fold(net.eval(), image().half(), merge_branches=True)


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")
def test_branches_of_an_exported_graph_are_merged() -> None:
    """In the graph itself: copies are made from that."""
    block = randomise(Net(lambda s, x: s.one(x), one=RepBlock()))
    graph = torch.export.export(block, (image(),)).module()
    result = bnctl.fold(graph, image(), merge_branches=True)
    assert result.report.summary == {"found": 3, "folded": 3, "left": 0, "merged": 1}
    x = image()
    for folded in (result.model, copy.deepcopy(result.model)):
        assert error(outputs(block, x), [folded(x).detach().double()]) < 1e-5


def test_bundle_of_a_merged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    (tmp_path / "rep_net.py").write_text(
        "from test_merge import RepBlock\nfrom torch import nn\ndef build():\n    return nn.Sequential(RepBlock(), RepBlock())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ended = cli("fold", "rep_net:build", "--input", "2x4x8x8", "-o", "out", "--merge-branches", "--json")
    assert ended.code == 0, ended.err
    assert faults(ended.document) == []
    assert ended.document["summary"] == {"found": 6, "folded": 6, "left": 0, "merged": 2}
    back = bnctl.load("out", trust=True)
    assert operators(back, image()) == ["conv2d", "relu"] * 2
    x = image()
    assert error(outputs(back, x), outputs(pickle.loads(pickle.dumps(back)), x)) == 0


class Branches(nn.Module):
    """Any number of convolutions side by side, some with a norm, some subtracted, perhaps with the value itself and a norm behind the sum."""

    def __init__(
        self, kinds: list[tuple[tuple[int, int], int, bool, bool]], groups: int, skip: bool, norm: bool
    ) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.signs = [-1 if minus else 1 for _, _, _, minus in kinds]
        for kernel, dilation, bn, _ in kinds:
            padding = tuple(dilation * (k - 1) // 2 for k in kernel)
            conv = Conv(4, 4, kernel, padding=padding, dilation=dilation, groups=groups, bias=not bn)
            self.convs.append(conv)
            self.norms.append(BN(4) if bn else nn.Identity())
        self.skip, self.bn = skip, BN(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.convs[0](x))
        for sign, conv, norm in zip(self.signs[1:], self.convs[1:], self.norms[1:], strict=True):
            y = y + norm(conv(x)) if sign > 0 else y - norm(conv(x))
        return self.bn(y + x if self.skip else y).relu()  # type: ignore[no-any-return]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 1), (5, 5)]), st.just(1), st.booleans(), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_random_branches_become_one(kinds: Any, groups: int, skip: bool, norm: bool) -> None:
    torch.manual_seed(len(kinds))
    model = randomise(Branches(kinds, groups, skip, norm)).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    folded = bnctl.fold(model, x, merge_branches=True, verify=False).model
    assert operators(folded, x) == ["conv2d", "relu"]
    for other in (x, torch.randn(1, 4, 9, 5, dtype=torch.float64)):
        assert error(outputs(model, other), outputs(folded, other)) < 1e-10


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from([(1, 1), (3, 3), (5, 1)]), st.sampled_from([1, 2]), st.booleans(), st.booleans()),
        min_size=2,
        max_size=4,
    )
)
def test_random_branches_that_do_not_all_fit_keep_the_function(kinds: Any) -> None:
    torch.manual_seed(len(kinds))
    model = randomise(Branches(kinds, 1, True, True)).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    folded = bnctl.fold(model, x, merge_branches=True, verify=False).model
    assert error(outputs(model, x[:1]), outputs(folded, x[:1])) < 1e-10


# The authors' own


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("repvgg_a0", {}),
        ("mobileone_s0", {"layers": 1}),
        ("fastvit_t8", {}),
        ("repvit_m0_9", {}),
        ("repghostnet_050", {}),
    ],
)
def test_no_more_operators_than_by_hand(name: str, options: dict[str, Any]) -> None:
    import_module("torchvision")
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    size = 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomise(timm.create_model(name, pretrained=False)).eval()
    x = torch.randn(1, 3, size, size)
    ours = bnctl.fold(model, x, merge_branches=True).model
    by_hand = operators(reparameterize_model(model), x)
    found = operators(ours, x)
    for kind in ("conv", "linear", "add", "norm"):
        assert sum(kind in op for op in found) <= sum(kind in op for op in by_hand)
    assert error(outputs(model, x, torch.float64), outputs(ours, x)) < 1e-4


# Windows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    *[st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(0, 4)) for _ in range(2)],
    st.integers(1, 3),
)
def test_joined_windows_see_what_both_see(one: tuple[int, ...], two: tuple[int, ...], stride: int) -> None:
    """Random one-dimensional kernels: the sum of two convolutions against one of the merged kernel, where a window is found."""
    sizes = [(k, Window((stride,), (d,), (b,), (a,))) for k, d, b, a in (one, two)]
    joined = sizes[0][1].joined((sizes[0][0],), sizes[1][1], (sizes[1][0],))
    kernels = [np.arange(1.0, k + 1) * (i + 1) for i, (k, _) in enumerate(sizes)]
    x = np.sin(np.arange(23.0))
    results = [_convolve(x, kernel, window) for kernel, (_, window) in zip(kernels, sizes, strict=True)]
    if joined is None:
        return
    assert results[0].shape == results[1].shape
    window, (taps,) = joined
    total = np.zeros(taps)
    for kernel, (k, own) in zip(kernels, sizes, strict=True):
        start = (window.before[0] - own.before[0]) // window.dilation[0]
        total[start : start + k] += kernel
    np.testing.assert_allclose(_convolve(x, total, window), results[0] + results[1], atol=1e-12)


def test_windows_that_join_are_found() -> None:
    """The property above would hold if nothing ever joined."""
    assert Window((2,), (1,), (1,), (1,)).joined((3,), Window((2,), (1,), (0,), (0,)), (1,)) == (
        Window((2,), (1,), (1,), (1,)),
        (3,),
    )
    assert Window((1,), (1,), (1,), (0,)).joined((2,), Window((1,), (1,), (0,), (1,)), (2,)) == (
        Window((1,), (1,), (1,), (1,)),
        (3,),
    )
    assert Window((1,), (1,), (1,), (1,)).joined((3,), Window.single(1), (3,)) is None


def _convolve(x: Any, kernel: Any, window: Window) -> Any:
    (s,), (d,), (b,), (a,) = window.stride, window.dilation, window.before, window.after
    padded = np.concatenate([np.zeros(b), x, np.zeros(a)])
    count = (len(padded) - d * (len(kernel) - 1) - 1) // s + 1
    return np.array([sum(kernel[j] * padded[o * s + j * d] for j in range(len(kernel))) for o in range(count)])


# ONNX


def onnx_model(nodes: list[Any], initializers: dict[str, Any], channels: int = 4, opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 8, 8])],
        [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def run_onnx(model: onnx.ModelProto, x: Any) -> Any:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("form", ["Add", "Sum"])
def test_onnx_rep_block(form: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {"w3": rng.normal(size=(4, 4, 3, 3)), "w1": rng.normal(size=(4, 4, 1, 1)), "b1": rng.normal(size=4)}
    arrays |= {f"{p}{i}": rng.uniform(0.5, 1.5, 4) for i in (1, 2) for p in ("g", "s", "m", "v")}
    nodes = [
        helper.make_node("Conv", ["x", "w3"], ["c3"], "conv3", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c3", "g1", "s1", "m1", "v1"], ["n3"], "norm3"),
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1"),
        helper.make_node("BatchNormalization", ["x", "g2", "s2", "m2", "v2"], ["n0"], "norm0"),
        *(
            [helper.make_node("Sum", ["n3", "c1", "n0"], ["total"], "sum")]
            if form == "Sum"
            else [
                helper.make_node("Add", ["n0", "n3"], ["part"], "add1"),
                helper.make_node("Add", ["part", "c1"], ["total"], "add2"),
            ]
        ),
        helper.make_node("Relu", ["total"], ["y"], "relu"),
    ]
    model = onnx_model(nodes, arrays)
    result = bnctl.fold(model, merge_branches=True)
    onnx.checker.check_model(result.model, full_check=True)
    assert [n.op_type for n in result.model.graph.node] == ["Conv", "Relu"]
    assert [o for n in result.model.graph.node for o in n.output] == ["total", "y"]
    assert len(result.model.graph.initializer) == 2
    assert result.report.summary == {"found": 2, "folded": 2, "left": 0, "merged": 1}
    for batch in (1, 3):
        x = rng.normal(size=(batch, 4, 8, 8)).astype(np.float32)
        np.testing.assert_allclose(run_onnx(result.model, x), run_onnx(model, x), rtol=1e-4, atol=1e-4)


def test_onnx_asymmetric_pads_and_a_sum_that_stays() -> None:
    rng = np.random.default_rng(1)
    arrays = {
        "w1": rng.normal(size=(4, 4, 2, 2)),
        "w2": rng.normal(size=(4, 4, 2, 2)),
        "w3": rng.normal(size=(4, 4, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "a", pads=[1, 1, 0, 0]),
        helper.make_node("Conv", ["x", "w2"], ["b"], "b", pads=[0, 0, 1, 1]),
        helper.make_node("Relu", ["x"], ["r"], "r"),
        helper.make_node("Sum", ["a", "r", "b"], ["y"], "sum"),
    ]
    model = onnx_model(nodes, {k: arrays[k] for k in ("w1", "w2")})
    result = bnctl.fold(model, merge_branches=True)
    assert [n.op_type for n in result.model.graph.node] == ["Conv", "Relu", "Sum"]
    assert list(result.model.graph.output[0].name) == ["y"]
    x = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run_onnx(result.model, x), run_onnx(model, x), rtol=1e-4, atol=1e-4)


def free_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model for images of any size."""
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in ((2, "h"), (3, "w")):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    return model


def test_onnx_images_of_any_size() -> None:
    """Shape inference knows no size of the branches; that they are equal follows from where the kernels look."""
    rng = np.random.default_rng(2)
    arrays = {"w3": rng.normal(size=(4, 4, 3, 3)), "w1": rng.normal(size=(4, 4, 1, 1)), "k": rng.normal(size=(4, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["x", "w3"], ["c3"], "conv3", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "w1"], ["c1"], "conv1"),
        helper.make_node("Mul", ["x", "k"], ["scaled"], "scale"),
        helper.make_node("Sum", ["c3", "c1", "scaled", "x"], ["y"], "sum"),
    ]
    model = free_sizes(onnx_model(nodes, arrays))
    result = bnctl.fold(model, merge_branches=True)
    assert [n.op_type for n in result.model.graph.node] == ["Conv"]
    for height, width in ((8, 8), (7, 2), (1, 1)):
        x = rng.normal(size=(2, 4, height, width)).astype(np.float32)
        np.testing.assert_allclose(run_onnx(result.model, x), run_onnx(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "outer", "settings"), [(3, 4, {}), (1, 1, {}), (1, 4, {"strides": [2, 2]})])
def test_onnx_branches_that_may_be_broadcast_stay(kernel: int, outer: int, settings: dict[str, Any]) -> None:
    """On the sizes that fit, the second branch has one position, or one channel, and is added everywhere."""
    rng = np.random.default_rng(3)
    arrays = {"w1": rng.normal(size=(4, 4, 1, 1)), "w2": rng.normal(size=(outer, 4, kernel, kernel))}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "a"),
        helper.make_node("Conv", ["x", "w2"], ["b"], "b", **settings),
        helper.make_node("Add", ["a", "b"], ["y"], "sum"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, "h", "w"])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    given = ir.from_proto(model)
    captured = OnnxEngine().capture(Model("onnx", given, "m"))
    assert OnnxEngine().plan_merges(captured, lambda name: True) == ()


def test_a_wrong_merge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: verification notices a kernel that is put in the wrong place."""
    from bnctl.plan import merge

    monkeypatch.setattr(merge, "_offset", lambda m, op: (0,) * len(m.kernel))
    net = randomise(Net(lambda s, x: s.a(x) + s.b(x), a=Conv(4, 4, 3, padding=1), b=Conv(4, 4, 1)))
    with pytest.raises(bnctl.errors.EquivalenceError):
        bnctl.fold(net, image(), merge_branches=True)


def test_a_merged_layer_that_other_code_looks_at_stays() -> None:
    block = Net(lambda s, x: (s.a(x) + s.b(x)).relu(), a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    model = Net(lambda s, x: s.block(x.to(s.block.b.weight.dtype)), block=block)
    result = bnctl.fold(model, image(), merge_branches=True)
    assert isinstance(result.model.block.b, nn.Conv2d)
    assert result.report.summary["merged"] == 1
    x = image()
    assert error(outputs(model, x, torch.float64), [result.model(x).detach().double()]) < 1e-5
