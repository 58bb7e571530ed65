"""Folding ONNX models, operators in between: what an affine moves through."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from test_onnx_checks import FREE, Net, all_folded, count, fold, fold_and_check, left

# Trap 17: constants that are not per channel


@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (4,), (1, 1, 4, 1), (4, 1, 1), (1, 4, 1, 1), (1, 4, 4, 4)])
@pytest.mark.parametrize("constant_first", [False, True])
def test_arithmetic_with_constants(op: str, shape: tuple[int, ...], constant_first: bool) -> None:
    net = Net(FREE, 4, 4, 4)
    c = net.normal(*shape) + 3
    v = net.conv("x", 4, 4, 1)
    net.add(op, *((c, v) if constant_first else (v, c)), out="y")
    folded, found = fold_and_check(net.model("y"))
    per_channel = shape in {(4, 1, 1), (1, 4, 1, 1)}
    nonlinear = op == "Div" and constant_first
    assert list(found.values()) == ([None] if per_channel and not nonlinear else [])
    assert count(folded, op) == (0 if found else 1)


def test_arithmetic_that_broadcasts_the_value() -> None:
    net = Net(FREE, 1, 4, 4)
    net.add("Mul", net.conv("x", 1, 1, 1), net.normal(1, 4, 1, 1), out="y")
    folded, found = fold_and_check(net.model("y"))
    assert found == {} and count(folded, "Mul") == 1


def test_scalars_between_conv_and_batch_norm() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("Neg", net.add("Mul", net.conv("x", 4, 4), np.float64(0.5)))
    all_folded(net, net.bn(v, 4))


def test_keras_chain() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4, bias=False)
    for op, constant in (("Sub", net.normal(4, 1, 1)), ("Mul", net.normal(1, 4, 1, 1)), ("Add", net.normal(4, 1, 1))):
        v = net.add(op, v, constant)
    folded, found = fold_and_check(net.model(net.add("Relu", v)))
    assert [n.op_type for n in folded.graph] == ["Conv", "Relu"]
    assert list(found.values()) == [None] * 3


# Operators that pass


def _concat(net: Net) -> str:
    return net.bn(net.add("Concat", net.conv("x", 4, 4, 1), net.conv("x", 4, 8, 1), axis=1), 12)


def _residual(net: Net) -> str:
    return net.bn(net.add("Add", net.conv("x", 4, 4, 1), net.conv("x", 4, 4, 1)), 4)


def _difference(net: Net) -> str:
    return net.bn(net.add("Sub", net.conv("x", 4, 4, 1), net.conv("x", 4, 4, 1)), 4)


def _average(net: Net) -> str:
    return net.bn(net.add("AveragePool", net.conv("x", 4, 4, 1), kernel_shape=[3, 3], pads=[1, 1, 1, 1]), 4)


def _resize(net: Net) -> str:
    v = net.conv("x", 4, 4, 1)
    return net.bn(net.add("Resize", v, "", np.array([1, 1, 2, 2], np.float32), mode="linear"), 4)


def _reflect(net: Net) -> str:
    return net.bn(net.add("Pad", net.conv("x", 4, 4, 1), np.array([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect"), 4)


def _shuffle(net: Net) -> str:
    v = net.add("Reshape", net.conv("x", 4, 8, 1), np.array([0, 2, 4, 6, 6]))
    v = net.add("Reshape", net.add("Transpose", v, perm=[0, 2, 1, 3, 4]), np.array([0, 8, 6, 6]))
    return net.bn(v, 8)


def _mean(net: Net) -> str:
    return net.bn(net.add("ReduceMean", net.conv("x", 4, 4, 1), axes=[2, -1], keepdims=0), 4)


def _split(net: Net) -> str:
    out = net.add("Split", net.bn(net.add("Relu", "x"), 4), np.array([1, 3]), axis=1, outputs=2)
    return net.add("Concat", net.conv(out, 1, 2, 1), net.conv(f"{out}_1", 3, 2, 1), axis=1)


def _slice(net: Net) -> str:
    v = net.add("Slice", net.bn(net.add("Relu", "x"), 4), np.array([-3]), np.array([100]), np.array([1]))
    return net.conv(v, 3, 2, 1)


def _spatial_slice(net: Net) -> str:
    return net.bn(net.add("Slice", net.conv("x", 4, 4, 1), np.array([1]), np.array([5]), np.array([-1])), 4)


def _squeeze(net: Net) -> str:
    v = net.add("Unsqueeze", net.conv("x", 4, 4, 1), np.array([2]))
    return net.bn(net.add("Dropout", net.add("Identity", v)), 4)


@pytest.mark.parametrize(
    "build",
    [
        _concat,
        _residual,
        _difference,
        _average,
        _resize,
        _reflect,
        _shuffle,
        _mean,
        _split,
        _slice,
        _spatial_slice,
        _squeeze,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_passing_operators(build: Any) -> None:
    net = Net(FREE, 4, 6, 6)
    all_folded(net, build(net))


def test_global_pools() -> None:
    net = Net(FREE, 4, 6, 6)
    all_folded(net, net.bn(net.add("GlobalAveragePool", net.conv("x", 4, 4, 1)), 4))


@pytest.mark.parametrize(
    ("op", "attributes", "code"),
    [
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, "BN114"),
        ("LpPool", {"kernel_shape": [3, 3]}, "BN116"),
    ],
)
def test_operators_that_do_not_pass(op: str, attributes: dict[str, Any], code: str) -> None:
    net = Net(FREE, 4, 6, 6)
    left(net, code, net.bn(net.add(op, net.conv("x", 4, 4, 1), **attributes), 4))


def test_a_mask_that_is_read_makes_a_dropout_opaque() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("Dropout", net.conv("x", 4, 4, 1), outputs=2)
    model = net.model(net.bn(v, 4))
    used = ir.to_proto(model)
    used.graph.output.append(onnx.ValueInfoProto(name=f"{v}_1"))
    _, found = fold(ir.from_proto(used))
    assert list(found.values()) == ["BN116"]


def test_a_constant_pad_does_not_pass_backwards() -> None:
    net = Net(FREE, 4, 6, 6)
    left(net, "BN114", net.bn(net.add("Pad", net.conv("x", 4, 4, 1), np.array([0, 0, 1, 1, 0, 0, 1, 1])), 4))


def test_an_unknown_domain_is_opaque() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("Identity", net.conv("x", 4, 4, 1), domain="my.domain")
    _, found = fold(net.model(net.add("Relu", net.bn(v, 4))))
    assert list(found.values()) == ["BN116"]


def test_behind_an_unknown_operator_a_conv_still_takes_its_batch_norm() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv(net.add("Mystery", "x", domain="my.domain"), 4, 8)
    _, found = fold(net.model(net.bn(v, 8)))
    assert list(found.values()) == [None]
