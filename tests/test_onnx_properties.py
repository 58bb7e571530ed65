"""Any chain of common operators computes the same after folding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnctl.graph.affine import AffineMap
from test_onnx_checks import FREE as BATCH
from test_onnx_checks import Net, fold, relative_error, run

C, SIDE = 4, 4
"""As many channels as rows and columns, so that no confusion of axes shows in a shape."""

KINDS = (
    *("conv", "padded", "transposed", "matmul", "bn", "bn", "bn", "mul", "bias", "relu"),
    *("transpose", "reshape", "concat", "add", "sub", "pool", "max", "split", "branch"),
    *("sum", "broadcast", "slices", "halves", "gate", "overlap", "counted", "pad_and_crop", "reduce"),
    *("matmul_left", "einsum", "instance_norm", "layer_norm"),
)

FREE = (
    "flip",
    "gather",
    "shuffle",
    "depth",
    "depth_crd",
    "parts",
    "reflect",
    "edge",
    "wrap",
    "cubic",
    "expand",
    "tile",
    "ones",
    "average",
)
"""Every affine per channel passes these, in both directions."""


def grow(net: Net, x: str, kind: str) -> str:
    """One more step; every step keeps the shape (N, 4, 4, 4)."""
    match kind:
        case "conv":
            return net.conv(x, C, C, 1, groups=int(net.rng.choice([1, 2, 4])), bias=bool(net.rng.integers(2)))
        case "padded":
            return net.conv(x, C, C, 3, pads=[1, 1, 1, 1])
        case "transposed":
            return net.add(
                "ConvTranspose", x, net.normal(C, C // 2, 3, 3) / 3, net.normal(C), group=2, pads=[1, 1, 1, 1]
            )
        case "bn":
            return net.bn(x, C)
        case "relu":
            return net.add("Relu", x)
        case "transpose":
            return net.add("Transpose", x, perm=[0, *(int(i) for i in net.rng.permutation([1, 2, 3]))])
        case "reshape":
            target = [[0, 8, 2, 4], [0, 2, 2, 4, 4], [0, 4, 16], [0, 64]][int(net.rng.integers(4))]
            return net.add("Reshape", net.add("Reshape", x, np.array(target)), np.array([0, C, SIDE, SIDE]))
        case "flip":
            return net.add("Slice", x, np.array([-1, 3]), np.array([-9, -9]), np.array([1, 3]), np.array([-1, -1]))
        case "gather":
            return net.add("Gather", x, net.rng.permutation(C), axis=1)
        case "shuffle":
            halves = net.add("Transpose", net.add("Reshape", x, np.array([0, 2, 2, 4, 4])), perm=[0, 2, 1, 3, 4])
            return net.add("Reshape", halves, np.array([0, C, SIDE, SIDE]))
        case "depth" | "depth_crd":
            # The four copies of a channel keep together, so that a map per channel stays one.
            wide = net.add(
                "Gather", x, np.tile(np.arange(C), 4) if kind == "depth" else np.repeat(np.arange(C), 4), axis=1
            )
            deep = net.add("DepthToSpace", wide, blocksize=2, mode="DCR" if kind == "depth" else "CRD")
            return net.add("Slice", deep, np.array([1, 0]), np.array([99, 99]), np.array([2, 3]), np.array([2, 2]))
        case "parts":
            first = net.add("Split", x, np.array([1, 3]), axis=1, outputs=2)
            return net.add("Concat", f"{first}_1", first, axis=1)
        case "reflect" | "edge" | "wrap":
            wide = net.add("Pad", x, np.array([0, 0, 1, 2, 0, 0, 2, 1]), mode=kind)
            return net.add("Pad", wide, np.array([0, 0, -2, -2, 0, 0, -1, -1]))
        case "cubic":
            wide = net.add("Resize", x, "", np.array([1, 1, 2, 2], np.float32), mode="cubic")
            return net.add("Resize", wide, "", np.array([1, 1, 0.5, 0.5], np.float32), mode="nearest")
        case "expand":
            return net.add("Expand", net.add("GlobalAveragePool", x), np.array([1, 1, SIDE, SIDE]))
        case "tile":
            return net.add(
                "Slice", net.add("Tile", x, np.array([1, 1, 2, 1])), np.array([3]), np.array([7]), np.array([2])
            )
        case "ones":
            return net.add("Squeeze", net.add("Unsqueeze", x, np.array([1, -1])), np.array([-1, 1]))
        case "average":
            return net.add("AveragePool", x, kernel_shape=[3, 3], auto_pad="SAME_LOWER")
        case "sum":
            return net.add("Sum", net.conv(x, C, C, 1), net.conv(x, C, C, 1), net.conv(x, C, C, 1, bias=False))
        case "broadcast":
            return net.add("Sub", net.conv(net.add("GlobalAveragePool", x), C, C, 1), net.conv(x, C, C, 1))
        case "slices" | "overlap":
            v = net.conv(x, C, C, 1)
            cuts = ((0, 2), (2, 4)) if kind == "slices" else ((0, 3), (3 - 1, 3))
            parts = [net.add("Slice", v, np.array([a]), np.array([b]), np.array([1])) for a, b in cuts]
            return net.add("Concat", *(net.bn(p, b - a) for p, (a, b) in zip(parts, cuts, strict=True)), axis=1)
        case "halves":
            first = net.add("Split", net.conv(x, C, C, 1), np.array([2, 2]), axis=1, outputs=2)
            half = net.bn(net.add("Sub", first, f"{first}_1"), 2)
            return net.add("Concat", half, net.add("Slice", x, np.array([0]), np.array([2]), np.array([1])), axis=1)
        case "gate":
            gate = net.add("Sigmoid", net.add("GlobalMaxPool", x))
            return net.add("Mul", gate, net.conv(x, C, C, 1))
        case "counted":
            return net.add("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
        case "pad_and_crop":
            wide = net.add("Pad", x, np.array([0, 1, 0, 1, 0, 1, 0, 0]), np.array(0.5, np.float32))
            return net.add("Slice", wide, np.array([0, 0]), np.array([4, 4]), np.array([1, 3]))
        case "reduce":
            op = ("GlobalMaxPool", "GlobalAveragePool")[int(net.rng.integers(2))]
            return net.add("Add", net.add(op, x), net.conv("x", C, C, 1))
        case "concat":
            return net.add("Concat", net.conv(x, C, 2, 1), net.conv(x, C, 2, 1), axis=1)
        case "add" | "sub":
            return net.add(kind.title(), net.conv(x, C, C, 1), net.conv(x, C, C, 1))
        case "pool":
            return net.add("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        case "max":
            return net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        case "mul" | "bias":
            shape = [(4, 1, 1), (4,), (1, 4, 1), (1, 4, 1, 1), ()][int(net.rng.integers(5))]
            constant = net.normal(*shape) if shape else np.float64(-0.5)
            return net.add("Mul" if kind == "mul" else "Add", x, constant)
        case "matmul":
            return net.add("Add", net.add("MatMul", x, net.normal(SIDE, SIDE) / 2), net.normal(SIDE))
        case "matmul_left":
            return net.add("Add", net.add("MatMul", net.normal(SIDE, SIDE) / 2, x), net.normal(SIDE, 1))
        case "einsum":
            equation, parts = (("bchw,cd->bdhw", (x, net.normal(C, C))), ("dc,bchw", (net.normal(C, C), x)))[
                int(net.rng.integers(2))
            ]
            return net.add("Einsum", *parts, equation=equation)
        case "instance_norm":
            return net.add("InstanceNormalization", x, net.normal(C), net.normal(C))
        case "layer_norm":
            last = net.add(
                "LayerNormalization", net.add("Transpose", x, perm=[0, 2, 3, 1]), net.normal(C), net.normal(C)
            )
            return net.add("Transpose", last, perm=[0, 3, 1, 2])
        case "split":
            first = net.add("Split", x, np.array([1, 3]), axis=1, outputs=2)
            return net.add("Concat", f"{first}_1", first, axis=1)
        case _:
            return net.add("Add", x, net.add("Relu", net.bn(net.conv(x, C, C, 1), C)))


def assert_kept(net: Net, y: str, seed: int) -> dict[str, str | None]:
    """The folded model computes what the original does, in outputs and inner values of equal name; returns what became of each site."""
    model = net.model(net.add("Identity", y, out="y"))
    folded, found = fold(model)
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    for batch in (1, 2):
        x = np.random.default_rng(seed).normal(0, 1, (batch, C, SIDE, SIDE)).astype(net.dtype)
        before, after = run(model, {"x": x}), run(folded, {"x": x})
        for name in before.keys() & after.keys():
            assert relative_error(before[name], after[name]) < 1e-3, name
    return found


def chain(kinds: Sequence[str], seed: int) -> tuple[Net, str]:
    net, v = Net(BATCH, C, SIDE, SIDE, opset=19 if "wrap" in kinds else 17, seed=seed), "x"
    for kind in kinds:
        v = grow(net, v, kind)
    return net, v


SETTINGS = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(kinds=st.lists(st.sampled_from(KINDS + FREE), min_size=2, max_size=9), seed=st.integers(0, 2**16))
def test_folding_preserves_any_chain(kinds: list[str], seed: int) -> None:
    assert_kept(*chain(kinds, seed), seed)


@settings(SETTINGS, max_examples=80)
@given(kinds=st.lists(st.sampled_from(FREE), min_size=1, max_size=6), ahead=st.booleans(), seed=st.integers(0, 2**16))
def test_what_the_algebra_can_move_is_gone(kinds: list[str], ahead: bool, seed: int) -> None:
    steps = ["relu", "bn", *kinds, "conv"] if ahead else ["conv", *kinds, "bn", "relu"]
    assert list(assert_kept(*chain(steps, seed), seed).values()) == [None]


@pytest.mark.parametrize(
    ("method", "wrong", "kind"),
    [
        ("put", lambda right: lambda m, axis, at, size: right(m, axis, sorted(at), size), "gather"),
        ("linear", lambda right: property(lambda m: m), "sum"),
        ("fixes", lambda right: lambda m, value: True, "pad_and_crop"),
    ],
)
def test_a_wrong_rule_is_caught(method: str, wrong: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same property fails where one rule of the algebra is wrong."""
    monkeypatch.setattr(AffineMap, method, wrong(getattr(AffineMap, method)))
    with pytest.raises(AssertionError):
        for seed in range(10):
            assert_kept(*chain(["conv", kind, "bn", "relu"], seed), seed)
