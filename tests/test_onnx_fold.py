"""Folding ONNX models: what folds, what is left with which code, and that the function stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnctl.engines.onnx.lift import lift
from bnctl.errors import ModelError, OverflowInFoldError
from test_onnx_checks import FREE, Net, count, fold, fold_and_check, run, worst_error


def all_folded(net: Net, *outputs: str, tolerance: float = 2e-5, check: bool = True) -> ir.Model:
    folded, found = fold_and_check(net.model(*outputs), tolerance, check=check)
    assert found and set(found.values()) == {None}, found
    assert count(folded, "BatchNormalization") == 0
    return folded


def left(net: Net, code: str, *outputs: str) -> ir.Model:
    folded, found = fold_and_check(net.model(*outputs))
    assert set(found.values()) == {code}, found
    assert count(folded, "BatchNormalization") == len(found)
    return folded


# Linear operators


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv(groups: int, bias: bool) -> None:
    net = Net(FREE, 4, 7, 7)
    all_folded(net, net.bn(net.conv("x", 4, 8, groups=groups, bias=bias, pads=[1, 1, 1, 1]), 8))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_convs_of_any_rank(op: str, spatial: int) -> None:
    net = Net(FREE, 4, *[5] * spatial)
    all_folded(net, net.bn(net.add(op, "x", net.normal(4, 4, *[3] * spatial)), 4))


@pytest.mark.parametrize(("groups", "cout"), [(1, 4), (2, 4), (2, 8), (4, 4), (4, 12)])
def test_transposed_conv_with_as_many_inputs_as_outputs(groups: int, cout: int) -> None:
    net = Net(FREE, 4, 5, 5)
    v = net.add(
        "ConvTranspose", "x", net.normal(4, cout // groups, 3, 3), net.normal(cout), group=groups, strides=[2, 2]
    )
    all_folded(net, net.bn(v, cout))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("c_shape", [None, (), (1,), (4,), (1, 4)])
def test_gemm_with_factors_and_any_bias(transposed: int, c_shape: tuple[int, ...] | None) -> None:
    net = Net(FREE, 4)
    c = [] if c_shape is None else [net.normal(*c_shape) if c_shape else np.float64(0.3)]
    all_folded(net, net.bn(net.add("Gemm", "x", net.normal(4, 4), *c, alpha=0.7, beta=1.9, transB=transposed), 4))


def test_gemm_with_a_bias_per_row() -> None:
    net = Net(4, 4)
    all_folded(net, net.bn(net.add("Gemm", "x", net.normal(4, 4), net.normal(4, 1)), 4))


@pytest.mark.parametrize("attributes", [{"transA": 1}, {"beta": 0.0}])
def test_other_gemms_are_opaque(attributes: dict[str, Any]) -> None:
    net = Net(4, 4)
    left(net, "BN116", net.bn(net.add("Gemm", "x", net.normal(4, 4), net.normal(4), **attributes), 4))


@pytest.mark.parametrize("bias_shape", [None, (4,), (1, 4), (1,), ()])
@pytest.mark.parametrize("first", [True, False])
def test_matmul_and_the_add_of_its_bias(bias_shape: tuple[int, ...] | None, first: bool) -> None:
    net = Net(FREE, 4)
    v = net.add("MatMul", "x", net.normal(4, 4), out="m")
    if bias_shape is not None:
        bias = net.normal(*bias_shape) if bias_shape else np.float64(0.5)
        v = net.add("Add", *((bias, v) if first else (v, bias)))
    folded = all_folded(net, net.bn(v, 4))
    assert count(folded, "Add") == 1


def test_a_matmul_whose_product_is_read_twice_keeps_its_add_apart() -> None:
    net = Net(FREE, 4)
    v = net.add("MatMul", "x", net.normal(4, 4), out="m")
    folded, found = fold_and_check(
        net.model(net.bn(net.add("Add", v, net.normal(4)), 4), net.add("Relu", "m", out="r"))
    )
    assert "BN101" in found.values()
    assert count(folded, "BatchNormalization") == 1


def test_an_embedding_gets_its_shift_behind_it() -> None:
    net = Net(FREE, 3, dtype=np.int64)
    table = net.param(net.normal(5, 4), dtype=np.float32)
    net.dtype = np.dtype(np.float32)
    v = net.add("Transpose", net.add("Gather", table, "x"), perm=[0, 2, 1])
    folded = all_folded(net, net.bn(v, 4))
    assert count(folded, "Add") == 1


# Trap 3: initializers that two nodes share


def test_a_shared_weight_is_untied() -> None:
    net = Net(FREE, 4, 6, 6)
    w = net.param(net.normal(4, 4, 3, 3), "w")
    one = net.bn(net.add("Conv", "x", w), 4)
    two = net.add("Conv", "x", w)
    folded = all_folded(net, one, two)
    weights = [n.inputs[1].name for n in folded.graph if n.op_type == "Conv"]
    assert len(set(weights)) == 2 and "w" in weights


def test_untying_is_counted() -> None:
    from bnctl.plan.fold import plan_fold

    net = Net(FREE, 4, 6, 6)
    w = net.param(net.normal(4, 4, 3, 3), "w")
    model = net.model(net.bn(net.add("Conv", "x", w), 4), net.bn(net.add("Conv", "x", w), 4))
    assert plan_fold(lift(model).graph).added_parameters == 2 * 4 * 4 * 9
    folded, found = fold_and_check(model)
    assert set(found.values()) == {None}


# Trap 4: other readers


def test_another_reader() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4, 1)
    b = net.add("Relu", net.bn(v, 4))
    left(net, "BN101", net.add("Add", v, b))


def test_an_output_of_the_model() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4)
    left(net, "BN102", v, net.bn(v, 4))


def test_a_reader_in_a_subgraph() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4)
    b = net.bn(v, 4)
    inner = [helper.make_node("Relu", [v], ["inner"])]
    out = [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    branch = helper.make_graph(inner, "branch", [], out)
    other = helper.make_graph(
        [helper.make_node("Neg", [b], ["inner2"])],
        "other",
        [],
        [helper.make_tensor_value_info("inner2", TensorProto.FLOAT, None)],
    )
    net.add("If", net.param(np.array(True)), out="y", then_branch=branch, else_branch=other)
    left(net, "BN101", "y")


def test_a_reader_of_the_shape_alone_does_not_mind() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4)
    b = net.bn(v, 4)
    net.add("Reshape", b, net.add("Shape", v), out="y")
    folded, found = fold_and_check(net.model("y"))
    assert set(found.values()) == {None}


# Trap 5: what stands in between


def test_a_relu_stands_in_the_way() -> None:
    net = Net(FREE, 4, 6, 6)
    left(net, "BN103", net.add("Relu", net.bn(net.add("Relu", net.conv("x", 4, 4)), 4)))


def test_a_preactivation_block() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4)
    b = net.add("Relu", net.bn(v, 4, out="first"))
    w = net.conv(b, 4, 4, pads=[1, 1, 1, 1], strides=[1, 1])
    b2 = net.add("Relu", net.bn(w, 4, out="second"))
    skip = net.add("Add", v, net.conv(b2, 4, 4, pads=[1, 1, 1, 1]))
    folded, found = fold_and_check(net.model(skip))
    assert found == {"n_first": "BN101", "n_second": None}
    assert count(folded, "BatchNormalization") == 1


def test_fed_by_the_input() -> None:
    net = Net(FREE, 4, 6, 6)
    left(net, "BN104", net.add("Relu", net.bn("x", 4)))


def test_a_quantised_weight() -> None:
    net = Net(FREE, 4, 6, 6)
    w = net.add("DequantizeLinear", np.ones((4, 4, 3, 3), np.int8), np.float32(0.1), np.int8(0))
    left(net, "BN111", net.bn(net.add("Conv", "x", w), 4))


def test_a_computed_weight() -> None:
    net = Net(4, 4, 3, 3)
    left(net, "BN108", net.bn(net.add("Conv", "x", net.add("Relu", "x"), pads=[1, 1, 1, 1]), 4))


def test_a_computed_bias() -> None:
    net = Net(4)
    v = net.add(
        "Conv", net.add("Expand", "x", np.array([1, 3, 8, 4])), net.param(net.normal(4, 3, 3, 3)), net.add("Relu", "x")
    )
    left(net, "BN108", net.bn(v, 4))


# Traps 6 to 8: axes that are equal in size


def test_linear_on_the_last_axis_and_batch_norm_on_axis_one() -> None:
    net = Net(FREE, 4, 4)
    left(net, "BN110", net.add("Relu", net.bn(net.add("MatMul", "x", net.normal(4, 4)), 4)))


def test_matmul_transposed_to_the_channel_axis() -> None:
    net = Net(FREE, 4, 4)
    v = net.add("Transpose", net.add("MatMul", "x", net.normal(4, 4)), perm=[0, 2, 1])
    all_folded(net, net.bn(v, 4))


@pytest.mark.parametrize("perm", [[0, 1, 3, 2], [0, 3, 1, 2], [0, 2, 1, 3]])
def test_square_transposes(perm: list[int]) -> None:
    net = Net(FREE, 4, 4, 4)
    v = net.add("Transpose", net.add("MatMul", "x", net.normal(4, 4)), perm=perm)
    _, found = fold_and_check(net.model(net.add("Relu", net.bn(v, 4))))
    assert list(found.values()) == [None if perm[1] == 3 else "BN110"]


def test_reshapes_with_square_sizes() -> None:
    net = Net(FREE, 4, 4)
    v = net.add("Reshape", net.add("MatMul", "x", net.normal(4, 4)), np.array([0, 4, 2, 2]))
    left(net, "BN110", net.add("Relu", net.bn(v, 4)))


def test_flatten_between_pool_and_linear() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("Flatten", net.add("GlobalAveragePool", net.bn(net.add("Relu", net.conv("x", 4, 4)), 4)))
    all_folded(net, net.add("Gemm", v, net.normal(3, 4), net.normal(3), transB=1))


# Trap 9: forwards into a conv


@pytest.mark.parametrize(
    ("attributes", "kernel", "code"),
    [
        ({}, 3, None),
        ({"pads": [0, 0, 0, 0]}, 3, None),
        ({"pads": [1, 1, 1, 1]}, 1, "BN114"),
        ({"pads": [0, 0, 0, 1]}, 3, "BN114"),
        ({"auto_pad": "VALID"}, 3, None),
        ({"auto_pad": "SAME_UPPER"}, 3, "BN114"),
        ({"auto_pad": "SAME_LOWER"}, 3, "BN114"),
        ({"auto_pad": "SAME_UPPER"}, 1, None),
        ({"auto_pad": "NOTSET", "pads": [1, 0, 0, 0]}, 1, "BN114"),
    ],
)
def test_zero_padding(attributes: dict[str, Any], kernel: int, code: str | None) -> None:
    net = Net(FREE, 4, 6, 6)
    net.conv(net.bn(net.add("Relu", "x"), 4, out="b"), 4, 8, kernel, **attributes)
    _, found = fold_and_check(net.model("v2"))
    got = found["n_b"]
    assert (got is None) == (code is None)
    if code is not None:
        assert got == "BN103"  # the reason backwards; the one forwards is in the text


def test_forwards_into_a_grouped_conv() -> None:
    net = Net(FREE, 4, 6, 6)
    all_folded(net, net.conv(net.bn(net.add("Relu", "x"), 4), 4, 8, groups=2, bias=False))


def test_forwards_into_several_readers() -> None:
    net = Net(FREE, 4, 6, 6)
    b = net.bn(net.add("Relu", "x"), 4)
    all_folded(net, net.conv(b, 4, 8), net.conv(b, 4, 4, 1))


# Traps 10, 11, 14: parameters


def test_negative_scales_stop_at_a_maximum_and_positive_ones_pass() -> None:
    for sign, code in ((1, None), (-1, "BN113")):
        net = Net(FREE, 4, 6, 6)
        v = net.add("MaxPool", net.conv("x", 4, 4), kernel_shape=[2, 2])
        stats = [net.param(a) for a in (np.array([1, 0.5, sign, 2.0]), net.normal(4), net.normal(4), np.ones(4))]
        _, found = fold_and_check(net.model(net.add("Relu", net.add("BatchNormalization", v, *stats))))
        assert list(found.values()) == [code]


def test_variance_that_is_not_positive() -> None:
    net = Net(FREE, 4, 6, 6)
    stats = [net.param(a) for a in (np.ones(4), np.zeros(4), np.zeros(4), -np.ones(4))]
    model = net.model(net.add("BatchNormalization", net.conv("x", 4, 4), *stats))
    _, found = fold(model)
    assert list(found.values()) == ["BN115"]


@pytest.mark.parametrize("eps", [None, 1e-3, 0.1])
def test_epsilon(eps: float | None) -> None:
    net = Net(FREE, 4, 6, 6)
    all_folded(net, net.bn(net.conv("x", 4, 4), 4, **({} if eps is None else {"epsilon": eps})))


# Trap 12: training mode


def test_training_mode() -> None:
    net = Net(FREE, 4, 6, 6)
    out = net.bn(net.conv("x", 4, 4), 4, training_mode=1, outputs=3)
    left(net, "BN105", out)


def test_further_outputs_mean_training_before_opset_14() -> None:
    net = Net(FREE, 4, 6, 6, opset=9)
    out = net.bn(net.conv("x", 4, 4), 4, outputs=5)
    _, found = fold(net.model(out))
    assert list(found.values()) == ["BN105"]


def test_an_affine_does_not_move_through_a_batch_norm_in_training() -> None:
    net = Net(FREE, 4, 6, 6)
    t = net.bn(net.conv("x", 4, 4), 4, training_mode=1, outputs=3, out="t")
    _, found = fold(net.model(net.add("Relu", net.bn(t, 4, out="b"))))
    assert found == {"n_t": "BN105", "n_b": "BN103"}


# Trap 15: half precision


def test_float16() -> None:
    net = Net(FREE, 4, 6, 6, dtype=np.float16)
    folded = all_folded(net, net.bn(net.conv("x", 4, 4), 4), tolerance=1e-2)
    assert {v.dtype for v in folded.graph.initializers.values()} == {ir.DataType.FLOAT16}


def test_float16_with_statistics_in_float32() -> None:
    net = Net(FREE, 4, 6, 6, dtype=np.float16)
    folded = all_folded(net, net.bn(net.conv("x", 4, 4, bias=False), 4, dtype=np.float32), tolerance=1e-2)
    assert {v.dtype for v in folded.graph.initializers.values()} == {ir.DataType.FLOAT16}


def test_bfloat16_stays_bfloat16() -> None:
    net = Net(FREE, 4, dtype=ml_dtypes.bfloat16)
    model = net.model(net.bn(net.add("MatMul", "x", net.normal(4, 4)), 4, dtype=np.float32))
    folded, found = fold(model)
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    assert list(found.values()) == [None]
    assert {v.dtype for v in folded.graph.initializers.values()} == {ir.DataType.BFLOAT16}


def test_float64() -> None:
    net = Net(FREE, 4, dtype=np.float64)
    all_folded(net, net.bn(net.add("MatMul", "x", net.normal(4, 4)), 4), tolerance=1e-12)


def test_overflow_is_refused() -> None:
    net = Net(FREE, 4, 6, 6, dtype=np.float16)
    stats = [net.param(a, dtype=np.float32) for a in (np.full(4, 1e6), np.zeros(4), np.zeros(4), np.ones(4))]
    model = net.model(net.add("BatchNormalization", net.conv("x", 4, 4), *stats))
    with pytest.raises(OverflowInFoldError, match="BN115"):
        fold(model)


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
    ("op", "attributes"),
    [
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("LpPool", {"kernel_shape": [3, 3]}),
        ("DepthToSpace", {"blocksize": 2}),
    ],
)
def test_operators_that_do_not_pass(op: str, attributes: dict[str, Any]) -> None:
    net = Net(FREE, 4, 6, 6)
    channels = 1 if op == "DepthToSpace" else 4
    left(net, "BN116", net.bn(net.add(op, net.conv("x", 4, 4, 1), **attributes), channels))


@pytest.mark.parametrize(("op", "outputs"), [("Dropout", 2), ("MaxPool", 2)])
def test_a_second_output_that_is_read_makes_an_operator_opaque(op: str, outputs: int) -> None:
    net = Net(FREE, 4, 6, 6)
    attributes = {"kernel_shape": [2, 2]} if op == "MaxPool" else {}
    v = net.add(op, net.conv("x", 4, 4, 1), outputs=outputs, **attributes)
    model = net.model(net.bn(v, 4))
    used = ir.to_proto(model)
    used.graph.output.append(onnx.ValueInfoProto(name=f"{v}_1"))
    _, found = fold(ir.from_proto(used))
    assert list(found.values()) == ["BN116"]


def test_a_constant_pad_does_not_pass_backwards() -> None:
    net = Net(FREE, 4, 6, 6)
    left(net, "BN116", net.bn(net.add("Pad", net.conv("x", 4, 4, 1), np.array([0, 0, 1, 1, 0, 0, 1, 1])), 4))


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


# Names


def test_equal_names_mean_equal_values() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4, 1)
    net.add("GlobalAveragePool", net.add("AveragePool", v, kernel_shape=[2, 2], out="p"), out="q")
    net.add("Relu", net.bn("q", 4, out="b"), out="r")
    net.bn("r", 4, out="s")
    net.add("Flatten", "s", out="f")
    net.add("Gemm", "f", net.normal(4, 4), out="y")
    model = net.model("y")
    folded = all_folded(net, "y")
    assert [n.outputs[0].name for n in folded.graph] == ["v0_folded", "p_folded", "b", "r", "f_folded", "y"]
    assert worst_error(model, folded)[0] < 2e-5


def test_names_that_users_know() -> None:
    net = Net(FREE, 4, 6, 6)
    w = net.param(net.normal(4, 4, 1, 1), "layer1.conv.weight")
    v = net.add("Conv", "x", w)
    stats = [
        net.param(a, f"layer1.bn.{n}")
        for n, a in zip(("weight", "bias", "running_mean", "running_var"), np.ones((4, 4)), strict=True)
    ]
    model = net.model(net.add("BatchNormalization", v, *stats))
    assert [n.layer for n in lift(model).graph.nodes] == ["layer1.conv", "layer1.bn"]


def test_names_of_nodes_without_names() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.conv("x", 4, 4), 4, out="y")
    for node in net.nodes:
        node.name = "same"
    assert [n.layer for n in lift(net.model("y")).graph.nodes] == ["v0", "y"]


def test_a_single_reader_keeps_the_name_of_its_weight() -> None:
    net = Net(FREE, 4, 6, 6)
    w = net.param(net.normal(4, 4, 1, 1), "conv.weight")
    folded = all_folded(net, net.bn(net.add("Conv", "x", w), 4))
    assert next(iter(folded.graph)).inputs[1].name == "conv.weight"


# Trap 19: forms of ONNX files


def test_an_overridable_weight() -> None:
    net = Net(FREE, 4, 6, 6)
    w = net.param(net.normal(4, 4, 3, 3), "w")
    net.inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4, 3, 3]))
    folded = left(net, "BN112", net.bn(net.add("Conv", "x", w), 4))
    assert [v.name for v in folded.graph.inputs] == ["x", "w"]


def test_overridable_statistics() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.conv("x", 4, 4), 4, out="y")
    mean = net.nodes[-1].input[3]
    net.inputs.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, [4]))
    left(net, "BN112", "y")


def test_before_ir_version_4_initializers_are_constants() -> None:
    net = Net(FREE, 4, 6, 6, opset=8, ir_version=3)
    folded = all_folded(net, net.bn(net.conv("x", 4, 4, bias=False), 4))
    assert {v.name for v in folded.graph.initializers.values()} < {v.name for v in folded.graph.inputs}
    assert len(folded.graph.initializers) == 2


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23])
def test_opsets(opset: int) -> None:
    net = Net(FREE, 4, 6, 6, opset=opset)
    v = net.add("Relu", net.bn(net.conv("x", 4, 8, bias=False), 8))
    v = net.add("Dropout", net.add("GlobalAveragePool", net.bn(net.conv(v, 8, 4, 1), 4)))
    v = net.add("Gemm", net.add("Flatten", v), net.normal(4, 3), net.normal(3))
    all_folded(net, v)


def test_an_opset_that_is_too_old() -> None:
    net = Net(FREE, 4, 6, 6, opset=6)
    with pytest.raises(ModelError, match="opset 6") as caught:
        lift(net.model(net.conv("x", 4, 4)))
    assert caught.value.hint


def test_statistics_per_position() -> None:
    net = Net(FREE, 4, 6, 6, opset=7)
    _, found = fold(net.model(net.bn(net.conv("x", 4, 4), 4, spatial=0)))
    assert list(found.values()) == ["BN116"]


def _as_constant_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes = list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend([*constants, *nodes])
    return proto


def test_constant_nodes_as_weights() -> None:
    net = Net(FREE, 4, 6, 6)
    net.add("Relu", net.bn(net.conv("x", 4, 4), 4), out="y")
    model = ir.from_proto(_as_constant_nodes(net.proto("y")))
    folded, found = fold_and_check(model)
    assert list(found.values()) == [None]
    assert count(folded, "Constant") == 0 and len(folded.graph.initializers) == 2


def test_constant_of_shape_as_weight() -> None:
    net = Net(FREE, 4, 6, 6)
    shape = net.param(np.array([4, 4, 3, 3]))
    w = [
        net.add("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([v], np.float32))) for v in (0.5, 0.25)
    ]
    one = net.bn(net.add("Conv", "x", w[0]), 4)
    two = net.add("Conv", "x", w[1])
    folded = all_folded(net, one, two)
    assert count(folded, "ConstantOfShape") == 1 and "p0" in folded.graph.initializers


def test_constant_expressions_as_weights() -> None:
    net = Net(FREE, 4, 6, 6)
    w = net.add("Cast", net.param(net.normal(4, 4, 1, 1), dtype=np.float16), to=TensorProto.FLOAT)
    w = net.add("Mul", net.add("Identity", w), net.add("Sqrt", net.param(np.full((4, 1, 1, 1), 2.0))))
    gamma = net.add("Reshape", net.param(net.normal(2, 2)), np.array([4]))
    stats = [gamma, *(net.param(a) for a in (net.normal(4), net.normal(4), np.ones(4)))]
    folded = all_folded(net, net.add("BatchNormalization", net.add("Conv", "x", w), *stats))
    assert len(folded.graph) == 1 and len(folded.graph.initializers) == 2


def test_unsqueezed_constants_in_arithmetic() -> None:
    net = Net(FREE, 4, 6, 6, opset=9)
    c = net.add("Unsqueeze", net.param(net.normal(4)), axes=[1, 2])
    net.add("Mul", net.conv("x", 4, 4), c, out="y")
    folded, found = fold_and_check(net.model("y"))
    assert list(found.values()) == [None] and count(folded, "Unsqueeze") == 0


def _subgraph(name: str, value: str, net: Net) -> onnx.GraphProto:
    node = helper.make_node("BatchNormalization", [value, *net.statistics(4)], [f"{name}_out"], name=f"{name}_bn")
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)])


def test_a_batch_norm_in_a_subgraph() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4)
    net.add(
        "If", net.param(np.array(True)), out="y", then_branch=_subgraph("a", v, net), else_branch=_subgraph("b", v, net)
    )
    _, found = fold_and_check(net.model("y"))
    assert found == {"a_bn": "BN120", "b_bn": "BN120"}


def test_a_batch_norm_in_a_local_function() -> None:
    net = Net(FREE, 4, 6, 6)
    stats = net.statistics(4)
    net.add("Block", net.conv("x", 4, 4), *stats, domain="local", out="y")
    proto = net.proto("y")
    names = ["x", "g", "b", "m", "v"]
    body = [helper.make_node("BatchNormalization", names, ["y"], name="inner_bn")]
    proto.functions.append(helper.make_function("local", "Block", names, ["y"], body, [helper.make_opsetid("", 17)]))
    model = ir.from_proto(proto)
    folded, found = fold(model)
    assert found == {"inner_bn": "BN120"}
    assert worst_error(model, folded)[0] == 0


def test_external_data(tmp_path: Path) -> None:
    net = Net(FREE, 4, 6, 6)
    net.add("Relu", net.bn(net.conv("x", 4, 64), 64), out="y")
    file = tmp_path / "model.onnx"
    onnx.save(net.proto("y"), file, save_as_external_data=True, location="weights.bin", size_threshold=64)
    model = ir.load(file)
    assert any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
    folded, found = fold(model)
    assert list(found.values()) == [None]
    feeds = {"x": np.ones((2, 4, 6, 6), np.float32)}
    before, after = run(net.model("y"), feeds, inner=False), run(folded, feeds, inner=False)
    assert np.allclose(before["y"], after["y"], atol=1e-4)


def test_untouched_tensors_are_shared() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("Relu", net.bn(net.conv("x", 4, 4, 1), 4))
    net.add("Conv", v, net.param(net.normal(4, 4, 1, 1), "last"), out="y")
    model = net.model("y")
    folded, _ = fold(model)
    assert folded.graph.initializers["last"].const_value is model.graph.initializers["last"].const_value


def test_what_only_others_read_stays() -> None:
    net = Net(FREE, 4, 6, 6)
    net.param(net.normal(3), "unused")
    net.add("Constant", out="dead", value=numpy_helper.from_array(np.ones(1, np.float32)))
    folded = all_folded(net, net.bn(net.conv("x", 4, 4), 4))
    assert "unused" in folded.graph.initializers and count(folded, "Constant") == 1


def test_statistics_that_two_batch_norms_share() -> None:
    net = Net(FREE, 4, 6, 6)
    stats = net.statistics(4)
    one = net.add("BatchNormalization", net.conv("x", 4, 4), *stats)
    two = net.add("BatchNormalization", net.add("Relu", one), *stats)
    folded, found = fold_and_check(net.model(net.add("Relu", two)))
    assert sorted(map(str, found.values())) == ["BN103", "None"]


def test_a_model_without_anything_to_fold() -> None:
    net = Net(FREE, 4, 6, 6)
    folded, found = fold_and_check(net.model(net.conv("x", 4, 4)))
    assert found == {} and len(folded.graph) == 1


def test_a_batch_norm_that_stays_takes_what_comes_behind_it() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.add("Relu", net.conv("x", 4, 4)), 4, out="stays")
    net.add("Mul", "stays", net.normal(4, 1, 1), out="m")
    folded, found = fold_and_check(net.model(net.add("Relu", "m")))
    assert found == {"n_stays": "BN103", "n_m": None}
    assert count(folded, "Mul") == 0


def test_shapes_of_a_broken_model_do_not_stop_lifting() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.conv("x", 4, 4), 4, out="y")
    proto = net.proto("y")
    proto.graph.value_info.append(helper.make_tensor_value_info("v0", TensorProto.FLOAT, [1, 99, 1]))
    _, found = fold(ir.from_proto(proto))
    assert len(found) == 1
