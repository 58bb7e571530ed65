"""Folding ONNX models, linear operators: what absorbs, what is left with which code, and that the function stays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from bnctl.engines.onnx.lift import lift
from bnctl.errors import OverflowInFoldError
from bnctl.plan.fold import plan_fold
from test_onnx_checks import FREE, Net, all_folded, count, fold, fold_and_check, left

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


def test_an_embedding_takes_a_shift_into_its_rows() -> None:
    net = Net(FREE, 3, dtype=np.int64)
    table = net.param(net.normal(5, 4), dtype=np.float32)
    net.dtype = np.dtype(np.float32)
    v = net.add("Transpose", net.add("Gather", table, "x"), perm=[0, 2, 1])
    folded = all_folded(net, net.bn(v, 4))
    assert [node.op_type for node in folded.graph] == ["Gather", "Transpose"]


def test_a_shift_that_goes_forward_into_a_matmul_renames_the_product() -> None:
    net = Net(FREE, 4, 4)
    v = net.add("Add", net.add("Relu", "x"), net.normal(4))
    folded, found = fold_and_check(
        net.model(net.add("Add", net.add("MatMul", v, net.normal(4, 4), out="m"), net.normal(4)))
    )
    assert list(found.values()) == [None] and count(folded, "Add") == 1


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
    net = Net(FREE, 4, 6, 6)
    w = net.param(net.normal(4, 4, 3, 3), "w")
    model = net.model(net.bn(net.add("Conv", "x", w), 4), net.bn(net.add("Conv", "x", w), 4))
    assert plan_fold(lift(model).graph).added_parameters == 4 * 4 * 9  # there are two where there was one
    _, found = fold_and_check(model)
    assert set(found.values()) == {None}


@pytest.mark.parametrize("bias", [None, "own", "shared"])
def test_branches_that_agree_go_on_sharing(bias: str | None) -> None:
    """One head on three feature maps, as detectors are exported: the same initializers everywhere."""
    net = Net(FREE, 4, 6, 6)
    w, statistics = net.param(net.normal(4, 4, 3, 3), "w"), net.statistics(4)
    common = net.param(net.normal(4))
    outputs = []
    for level in range(3):
        biases = () if bias is None else (common,) if bias == "shared" else (net.param(net.normal(4)),)
        v = net.add("Conv", net.add("Relu", "x") if level else "x", w, *biases)
        outputs.append(net.add("BatchNormalization", v, *statistics))
    plan = plan_fold(lift(net.model(*outputs)).graph)
    folded = all_folded(net, *outputs)
    convs = [n for n in folded.graph if n.op_type == "Conv"]
    assert plan.added_parameters == 0
    assert len({n.inputs[1].name for n in convs}) == 1


def test_a_reader_that_does_not_agree_keeps_the_old_weight() -> None:
    net = Net(FREE, 4, 6, 6)
    w, statistics = net.param(net.normal(4, 4, 3, 3), "w"), net.statistics(4)
    outputs = [net.add("BatchNormalization", net.add("Conv", "x", w), *statistics) for _ in range(2)]
    plain = net.add("Conv", "x", w)
    other = net.bn(net.add("Conv", "x", w), 4)
    assert plan_fold(lift(net.model(*outputs, plain, other)).graph).added_parameters == 2 * 4 * 4 * 9
    folded = all_folded(net, *outputs, plain, other)
    weights = [n.inputs[1].name for n in folded.graph if n.op_type == "Conv"]
    assert len(set(weights)) == 3 and weights[0] == weights[1] and weights[2] == "w"


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
    _, found = fold_and_check(net.model("y"))
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


@pytest.mark.parametrize(("factor", "code"), [(1, None), (0, "BN119"), (-1, "BN113")])
def test_a_maximum_that_also_says_where_it_is(factor: int, code: str | None) -> None:
    """Indices for an unpooling behind: a positive scale does not move the maxima, and of equal values nobody knows which one is taken."""
    net = Net(FREE, 4, 6, 6)
    pooled = net.add("MaxPool", net.conv("x", 4, 4, 3), outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    gamma, *others = net.statistics(4)
    gamma = net.param(np.array([1.0, 2.0, 0.5, 1.5]) * (1, 1, factor, 1))
    v = net.add("BatchNormalization", pooled, gamma, *others)
    y = net.add("MaxUnpool", v, f"{pooled}_1", kernel_shape=[2, 2], strides=[2, 2])
    _, found = fold_and_check(net.model(y))
    assert list(found.values()) == [code]
