"""The rules of the fold algebra on ONNX models: what an affine passes, in both directions, and what it must not pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from test_onnx_checks import FREE, Net, all_folded, fold, fold_and_check, left, relative_error, run

Step = Callable[[Net, str], str]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def step(op: str, *more: Any, opset: int = 17, **attributes: Any) -> tuple[int, Step]:
    return opset, lambda net, x: net.add(op, x, *more, **attributes)


def resize(mode: str, opset: int = 18, **attributes: Any) -> tuple[int, Step]:
    return step("Resize", "", np.array([1, 1, 0.5, 1.5], np.float32), opset=opset, mode=mode, **attributes)


def _sum(net: Net, x: str) -> str:
    return net.add("Sum", x, net.conv("x", 4, 8, 1, bias=False), net.conv("x", 4, 8, 1))


def _shuffle(net: Net, x: str) -> str:
    split = net.add("Reshape", x, ints(0, 2, 4, 6, 6))
    return net.add("Reshape", net.add("Transpose", split, perm=[0, 2, 1, 3, 4]), ints(-1, 8, 6, 6))


def _two_slices(net: Net, x: str) -> str:
    one, two = (net.add("Slice", x, ints(a), ints(b), ints(1)) for a, b in ((0, 4), (4, 8)))
    return net.add("Concat", two, one, axis=1)


def _thirds(net: Net, x: str) -> str:
    out = net.add("Split", x, ints(3, 3, 2), axis=-3, outputs=3)
    return net.add("Concat", f"{out}_2", out, f"{out}_1", axis=-3)


# name: (opset, operators on (N, 8, 6, 6)), channels behind them
PASS_BACK: dict[str, tuple[tuple[int, Step], int]] = {
    "sum_of_three": ((17, _sum), 8),
    "sum_and_constant": (step("Sum", np.ones((8, 1, 1))), 8),
    "every_second": (step("Slice", ints(0), ints(99), ints(1), ints(2)), 4),
    "backwards": (step("Slice", ints(-1), ints(-99), ints(-3), ints(-1)), 8),
    "several_axes": (step("Slice", ints(2, 0, 1), ints(8, -1, 5), ints(1, 2, -1)), 6),
    "slice_attributes": (step("Slice", opset=9, starts=[2, 1], ends=[100, 5], axes=[1, 2]), 6),
    "slices_without_overlap": ((17, _two_slices), 8),
    "thirds": ((17, _thirds), 8),
    "gather": (step("Gather", ints(5, -1, 0), axis=1), 3),
    "gather_space": (step("Gather", ints(0, 0, 1), axis=-1), 8),
    "channel_shuffle": ((17, _shuffle), 8),
    "depth_to_space": (step("DepthToSpace", blocksize=2), 2),
    "depth_to_space_crd": (step("DepthToSpace", blocksize=2, mode="CRD"), 2),
    "reflect": (step("Pad", ints(0, 0, 1, 2, 0, 0, 3, 1), mode="reflect"), 8),
    "edge": (step("Pad", ints(0, 0, 1, 2, 0, 0, 3, 1), mode="edge"), 8),
    "edge_attribute": (step("Pad", opset=10, pads=[0, 0, 1, 2, 0, 0, 3, 1], mode="edge"), 8),
    "wrap": (step("Pad", ints(0, 0, 1, 2, 0, 0, 3, 1), opset=19, mode="wrap"), 8),
    "chosen_axes": (step("Pad", ints(1, 1), "", ints(-1), opset=18, mode="edge"), 8),
    "crop": (step("Pad", ints(0, -1, 0, -1, 0, -2, -1, 0)), 5),
    "expand": ((17, lambda net, x: net.add("Expand", net.add("GlobalAveragePool", x), ints(1, 1, 4, 5))), 8),
    "tile_over_space": (step("Tile", ints(1, 1, 2, 3)), 8),
    "cubic": (resize("cubic"), 8),
    "cubic_outside": (resize("cubic", exclude_outside=1, cubic_coeff_a=-0.5), 8),
    "cubic_corners": (resize("cubic", 13, coordinate_transformation_mode="align_corners"), 8),
    "antialias": (resize("linear", antialias=1), 8),
    "nearest": (resize("nearest", nearest_mode="ceil"), 8),
    "ceil": (step("AveragePool", kernel_shape=[4, 4], strides=[3, 3], ceil_mode=1), 8),
    "same": (step("AveragePool", kernel_shape=[3, 3], auto_pad="SAME_UPPER"), 8),
    "sum_of_known_size": (step("ReduceSum", ints(2, 3), keepdims=1), 8),
    "sum_attribute": (step("ReduceSum", opset=11, axes=[-1], keepdims=0), 8),
    "flatten_squeeze": (
        (17, lambda net, x: net.add("Squeeze", net.add("Unsqueeze", x, ints(2, -1)), ints(-1, 2))), 8
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PASS_BACK)
def test_backwards(name: str) -> None:
    (opset, build), channels = PASS_BACK[name]
    net = Net(FREE, 4, 6, 6, opset=opset)
    all_folded(net, net.add("Relu", net.bn(build(net, net.conv("x", 4, 8, 1)), channels)))


# operators on (N, 4, 6, 6), channels behind them
PASS_AHEAD: dict[str, tuple[tuple[int, Step], int]] = {
    "gather": (step("Gather", ints(2, 2, 0), axis=1), 3),
    "backwards": (step("Slice", ints(-1), ints(-99), ints(1), ints(-1)), 4),
    "tile": (step("Tile", ints(1, 2, 1, 1)), 8),
    "space_to_depth": (step("SpaceToDepth", blocksize=2), 16),
    "wrap": (step("Pad", ints(0, 0, 1, 2, 0, 0, 3, 1), opset=19, mode="wrap"), 4),
    "channel_pad": (step("Pad", ints(0, 1, 0, 0, 0, 2, 0, 0), np.array(0.5, np.float32)), 7),
    "concat": ((17, lambda net, x: net.add("Concat", x, net.add("Sigmoid", "x"), axis=1)), 8),
    "cubic": (resize("cubic"), 4),
    "sum_of_known_size": (step("ReduceSum", ints(3), keepdims=1), 4),
    "expand": ((17, lambda net, x: net.add("Expand", net.add("GlobalAveragePool", x), ints(1, 1, 4, 5))), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", PASS_AHEAD)
def test_ahead(name: str) -> None:
    (opset, build), channels = PASS_AHEAD[name]
    net = Net(FREE, 4, 6, 6, opset=opset)
    all_folded(net, net.conv(build(net, net.bn(net.add("Relu", "x"), 4)), channels, 5, 1))


def test_constants_in_a_concat() -> None:
    net = Net(1, 4, 6, 6)
    ahead = net.add("Concat", net.normal(1, 2, 6, 6), net.bn(net.add("Relu", "x"), 4), axis=1)
    _, found = fold_and_check(net.model(net.conv(ahead, 6, 5)))
    assert list(found.values()) == [None]
    net = Net(1, 4, 6, 6)
    left(net, "BN114", net.bn(net.add("Concat", net.normal(1, 2, 6, 6), net.conv("x", 4, 4, 1), axis=1), 6))


STAY: dict[str, tuple[tuple[int, Step], int, str]] = {
    "space_to_depth": (step("SpaceToDepth", blocksize=2), 32, "BN110"),
    "tiled_channels": (step("Tile", ints(1, 2, 1, 1)), 16, "BN110"),
    "zero_padding": (step("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1)), 8, "BN114"),
    "channels_reflected": (step("Pad", ints(0, 2, 0, 0, 0, 2, 0, 0), mode="reflect"), 12, "BN110"),
    "zeros_counted_at_the_end": (
        step("AveragePool", kernel_shape=[4, 4], strides=[3, 3], ceil_mode=1, count_include_pad=1), 8, "BN114"
    ),
    "product": ((17, lambda net, x: net.add("Mul", x, net.add("Sigmoid", net.conv("x", 4, 8, 1)))), 8, "BN103"),
    "maximum": (step("ReduceMax", axes=[2, 3]), 8, "BN113"),
    "maximum_of_all": (step("GlobalMaxPool"), 8, "BN113"),
    "einsum": ((17, lambda net, x: net.add("Einsum", x, equation="nchw->ncwh")), 8, "BN116"),
    "crop_and_resize": (
        step("Resize", np.array([0, 0, 0, 0, 1, 1, 0.5, 2], np.float32), np.array([1, 1, 2, 1], np.float32), mode="linear",
             coordinate_transformation_mode="tf_crop_and_resize"), 8, "BN116",
    ),
    "channels_resized": (
        step("Resize", "", np.array([1, 2, 1, 1], np.float32), mode="nearest"), 16, "BN116"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_it_stays(name: str) -> None:
    (opset, build), channels, code = STAY[name]
    net = Net(FREE, 4, 6, 6, opset=opset)
    left(net, code, net.add("Relu", net.bn(build(net, net.conv("x", 4, 8, 1)), channels)))


@pytest.mark.parametrize(
    "build",
    [
        lambda net, x: net.add("ReduceMin", x, axes=[2, 3]),
        lambda net, x: net.add("ReduceMax", x, axes=[2]),
        lambda net, x: net.add("GlobalMaxPool", x),
        lambda net, x: net.add("Pad", x, ints(0, 0, 1, 1, 0, 0, 1, 1)),
        lambda net, x: net.add("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
        lambda net, x: net.add("Mul", net.add("Sigmoid", "x"), x),
    ],
)
@pytest.mark.parametrize("ahead", [True, False])
def test_positive_scales_without_shift(build: Step, ahead: bool) -> None:
    net = Net(FREE, 4, 6, 6)
    factor = np.abs(net.normal(4, 1, 1)) + 0.5
    before = net.add("Mul", net.add("Relu", "x"), factor) if ahead else net.conv("x", 4, 4, 1)
    mixed = build(net, before)
    _, found = fold_and_check(net.model(net.conv(mixed, 4, 5, 1) if ahead else net.add("Mul", mixed, factor)))
    assert list(found.values()) == [None]


# Sums


@pytest.mark.parametrize("op", ["Add", "Sub", "Sum"])
@pytest.mark.parametrize("first", [True, False])
def test_the_branch_that_has_room_takes_the_shift(op: str, first: bool) -> None:
    net = Net(FREE, 4, 4, 4)
    plain = net.add("MatMul", "x", net.normal(4, 4))  # its channels are the last axis, and the norm's are not
    plain = net.add("Transpose", plain, perm=[0, 3, 1, 2])
    conv = net.conv("x", 4, 4, 1)
    all_folded(net, net.add("Relu", net.bn(net.add(op, *((plain, conv) if first else (conv, plain))), 4)))


def test_a_branch_that_is_broadcast() -> None:
    net = Net(FREE, 4, 6, 6)
    gate = net.conv(net.add("GlobalAveragePool", "x"), 4, 4, 1)
    all_folded(net, net.add("Relu", net.bn(net.add("Add", gate, net.conv("x", 4, 4, 1)), 4)))


def test_one_channel_for_all_takes_no_scale_per_channel() -> None:
    net = Net(FREE, 4, 6, 6)
    left(net, "BN110", net.add("Relu", net.bn(net.add("Add", net.conv("x", 4, 1, 1), net.conv("x", 4, 4, 1)), 4)))


# Sizes that are not known


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (lambda net, x: net.add("DepthToSpace", x, blocksize=2), 2),
        (lambda net, x: net.add("Squeeze", net.add("Unsqueeze", x, ints(2)), ints(2)), 8),
        (lambda net, x: net.add("Slice", x, ints(1, 1), ints(-1, 4), ints(2, 1)), 3),
        (lambda net, x: net.add("Pad", x, ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"), 8),
        (lambda net, x: net.add("Split", x, axis=1, outputs=2), 4),
        (lambda net, x: net.add("Add", x, net.conv("x", 4, 8, 1)), 8),
        (lambda net, x: net.add("Tile", x, ints(1, 1, 2, 2)), 8),
    ],
)
@pytest.mark.parametrize("shape", [(FREE, 4, 6, 6), (FREE, 4, "H", "W"), (None, 4, None, None)])
def test_unknown_sizes(build: Step, channels: int, shape: tuple[Any, ...]) -> None:
    net = Net(*(6 if s is None else s for s in shape))
    y = net.add("Relu", net.bn(build(net, net.conv("x", 4, 8, 1)), channels))
    proto = net.proto(y)
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        if size is None:
            dim.Clear()
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    model = ir.from_proto(proto)
    folded, found = fold(model)
    assert list(found.values()) == [None]
    for batch, side in ((1, 6), (3, 6 if shape[2] == 6 else 8)):
        x = np.random.default_rng(batch).normal(0, 1, (batch, 4, side, side)).astype(np.float32)
        before, after = run(model, {"x": x}), run(folded, {"x": x})
        assert relative_error(before[y], after[y]) < 2e-5


def test_a_sum_over_unknown_sizes_takes_no_shift() -> None:
    net = Net(FREE, 4, "H", "W")
    _, found = fold(net.model(net.bn(net.add("ReduceSum", net.conv("x", 4, 4, 1), ints(2, 3), keepdims=1), 4)))
    assert list(found.values()) == ["BN116"]


@pytest.mark.parametrize(
    ("op", "opset", "attributes", "code"),
    [
        ("InstanceNormalization", 17, {}, None),
        ("GroupNormalization", 21, {"num_groups": 2}, None),
        ("LayerNormalization", 17, {}, None),
        ("LayerNormalization", 17, {"axis": 1}, "BN103"),
    ],
)
def test_a_norm_that_stays_takes_a_batch_norm_in(
    op: str, opset: int, attributes: dict[str, Any], code: str | None
) -> None:
    net = Net(FREE, 4, 4, 4, opset=opset)
    v = net.add("Exp", "x")
    size = (4, 4, 4) if "axis" in attributes else (4,)
    v = net.add("Transpose", v, perm=[0, 2, 3, 1]) if op == "LayerNormalization" else v
    v = net.add(op, v, net.normal(*size), net.normal(*size), **attributes)
    v = net.add("Transpose", v, perm=[0, 3, 1, 2]) if op == "LayerNormalization" else v
    model = net.model(net.add("Relu", net.bn(v, 4, out="norm")))
    _, found = fold_and_check(model, check=op != "GroupNormalization")  # of which onnx infers no shape
    assert found == {"n_norm": code}


def test_a_group_norm_with_a_scale_per_group_takes_nothing_in() -> None:
    net = Net(FREE, 4, 4, 4, opset=18)
    v = net.add("GroupNormalization", net.add("Exp", "x"), net.normal(2), net.normal(2), num_groups=2)
    _, found = fold(net.model(net.bn(v, 4, out="norm")))
    assert found == {"n_norm": "BN103"}


@pytest.mark.parametrize("kind", ["Max", "Min"])
@pytest.mark.parametrize("positive", [True, False])
def test_the_larger_of_several_takes_positive_scales(kind: str, positive: bool) -> None:
    net = Net(FREE, 3, 8, 8)
    v = net.add(kind, *(net.conv("x", 3, 4) for _ in range(3)))
    gamma = np.abs(net.normal(4)) + 0.1
    net.add("BatchNormalization", v, gamma if positive else -gamma, net.normal(4), net.normal(4), np.ones(4), out="y")
    if positive:
        all_folded(net, "y")
    else:
        left(net, "BN113", "y")
