"""Recalibrating ONNX models: forms of files, and what is left for which reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from bnctl.data.batches import Batch
from bnctl.errors import ModelError, UsageError
from onnx_recalibration import (
    Reference,
    data,
    error,
    left,
    plain,
    recalibrate,
    residual,
    split,
    statistics_of,
)
from test_onnx_checks import FREE, Net, count

# Forms of files


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 17, 21, 23])
def test_opsets(opset: int) -> None:
    net = residual(opset=opset, ir_version=3 if opset < 9 else 8)
    proto, x = net.proto("y"), data(5, 3, 8, 8)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    onnx.checker.check_model(ir.to_proto(new), full_check=True)
    assert [v.name for v in new.graph.inputs if not v.is_initializer()] == ["x"]
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


@pytest.mark.parametrize("opset", [13, 17])
def test_half_precision(opset: int) -> None:
    proto, x = residual(opset=opset, dtype=np.float16).proto("y"), data(5, 3, 8, 8)
    new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    assert {t.dtype for n in new.graph if n.op_type == "BatchNormalization" for t in n.inputs[3:]} == {
        ir.DataType.FLOAT16
    }
    assert 1e-6 < error(statistics_of(new), Reference(proto).exact(x)) < 2e-2
    assert max(s.self_consistency for s in sites) < 2e-3


def test_statistics_that_do_not_fit_half_precision() -> None:
    net = Net(FREE, 2, 2, dtype=np.float16)
    net.bn("x", 2, out="y")
    x = np.full((2, 2, 2), 60000, np.float16) * np.array([1, -1], np.float16)
    with pytest.raises(ModelError, match="n_y: the new statistics do not fit float16") as caught:
        recalibrate(net.model("y"), [Batch((x,))])
    assert caught.value.hint


def test_nodes_that_share_statistics_get_their_own() -> None:
    net = Net(FREE, 4, 6, 6)
    stats = net.statistics(4)
    v = net.add("BatchNormalization", net.conv("x", 4, 4), *stats, out="a")
    v = net.add("BatchNormalization", net.conv(net.add("Relu", v), 4, 4), *stats, out="b")
    net.add("BatchNormalization", net.add("Relu", v), *stats, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    model = ir.from_proto(proto)
    new, _, _ = recalibrate(model, split(x, 3, 2))
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5
    some, sites, _ = recalibrate(model, split(x, 3, 2), skip="n_y")
    assert [s.code for s in sites] == [None, None, "BN301"]
    mean = next(n for n in some.graph if n.outputs[0].name == "y").inputs[3]
    assert mean.name == stats[2] and np.array_equal(mean.const_value.numpy(), net.initializers[stats[2]])


def test_one_tensor_as_mean_and_variance() -> None:
    net = Net(FREE, 4, 6, 6)
    ones = net.param(np.ones(4))
    net.add("BatchNormalization", net.conv("x", 4, 4), ones, ones, ones, ones, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 5))
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5
    node = next(n for n in new.graph if n.outputs[0].name == "y")
    assert [v.name for v in node.inputs[1:3]] == [ones, ones]


def test_names_stay_where_nobody_else_has_them() -> None:
    model = plain().model("y")
    new, _, _ = recalibrate(model, split(data(4, 3, 8, 8), 4))
    assert [[v.name for v in n.inputs] for n in new.graph] == [[v.name for v in n.inputs] for n in model.graph]
    assert new.graph.initializers["p0"].const_value is model.graph.initializers["p0"].const_value


def test_statistics_in_constant_nodes() -> None:
    """As Paddle writes them."""
    proto, x = residual().proto("y"), data(5, 3, 8, 8)
    truth = Reference(proto).exact(x)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes = [*constants, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    onnx.checker.check_model(ir.to_proto(new), full_check=True)
    assert error(statistics_of(new), truth) < 2e-5
    assert count(new, "Constant") == len(constants) - 8 and len(new.graph.initializers) == 8


def test_external_data(tmp_path: Path) -> None:
    proto, x = residual().proto("y"), data(5, 3, 8, 8)
    truth = Reference(proto).exact(x)
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    new, _, _ = recalibrate(ir.load(tmp_path / "net.onnx"), split(x, 3, 2))
    assert error(statistics_of(new), truth) < 2e-5


def test_a_local_function_is_put_in_place_of_its_calls() -> None:
    net = Net(FREE, 4, 6, 6)
    stats = net.statistics(4)
    v = net.conv("x", 4, 4)
    net.nodes.append(helper.make_node("Norm", [v, *stats], ["n"], domain="mine"))
    net.nodes.append(helper.make_node("Norm", ["n", *stats], ["y"], domain="mine"))
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    body = [
        helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["r"]),
        helper.make_node("Relu", ["r"], ["y"]),
    ]
    proto.functions.append(
        helper.make_function("mine", "Norm", ["x", "s", "b", "m", "v"], ["y"], body, [helper.make_opsetid("", 17)])
    )
    new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    assert [s.action for s in sites] == ["recalibrated"] * 2
    assert error(statistics_of(new), Reference(ir.to_proto(new)).exact(x)) < 2e-5


def test_other_functions_stay() -> None:
    net = residual()
    for node in net.nodes:
        if node.op_type == "Relu":
            node.op_type, node.domain = "Act", "mine"
    proto, x = net.proto("y"), data(5, 3, 8, 8)
    body = [helper.make_node("Tanh", ["x"], ["t"]), helper.make_node("Add", ["x", "t"], ["y"])]
    proto.functions.append(helper.make_function("mine", "Act", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    assert [f.name for f in new.functions.values()] == ["Act"]
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


def test_a_norm_of_something_that_is_no_data() -> None:
    net = Net(FREE, 4, 4, 4)
    side = net.bn(net.add("Relu", net.normal(1, 4, 4, 4)), 4, out="b")
    net.bn(net.add("Add", net.bn("x", 4, out="a"), side), 4, out="y")
    proto, x = net.proto("y"), data(5, 4, 4, 4)
    for memory in (None, 0):
        new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2), memory_bytes=memory)
        assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


# What is left, and why


def test_overridable_statistics_are_left() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.bn("x", 4, out="a"), 4, out="y")
    mean = net.nodes[-1].input[3]
    net.inputs.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, [4]))
    left(net, net.model("y"), data(3, 4, 6, 6), "BN305", mean)


def test_an_overridable_weight_has_its_default_meanwhile() -> None:
    net = plain()
    proto, x = net.proto("y"), data(5, 3, 8, 8)
    truth = Reference(proto).exact(x)
    net.inputs.append(helper.make_tensor_value_info("p0", TensorProto.FLOAT, [4, 3, 3, 3]))
    new, _, _ = recalibrate(net.model("y"), split(x, 3, 2))
    assert error(statistics_of(new), truth) < 2e-5
    assert [v.name for v in new.graph.inputs] == ["x", "p0"]


def test_statistics_computed_from_data_are_left() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.bn("x", 4, out="a")
    gamma, beta, _, var = net.statistics(4)
    mean = net.add("ReduceMean", v, axes=[0, 2, 3], keepdims=0)
    net.add("BatchNormalization", v, gamma, beta, mean, var, out="y")
    left(net, net.model("y"), data(3, 4, 6, 6), "BN305", "computed in every run")


@pytest.mark.parametrize(("opset", "outputs", "attributes"), [(17, 3, {"training_mode": 1}), (9, 5, {})])
def test_training_mode_is_left(opset: int, outputs: int, attributes: dict[str, int]) -> None:
    net = Net(FREE, 4, 6, 6, opset=opset)
    v = net.bn("x", 4, out="a")
    net.add("BatchNormalization", v, *net.statistics(4), out="y", outputs=outputs, **attributes)
    left(net, net.model("y"), data(3, 4, 6, 6), "BN304", "training mode")


def test_statistics_per_position_are_left() -> None:
    net = Net(FREE, 4, 6, opset=7, ir_version=3)
    v = net.bn("x", 4, out="a")
    arrays = [net.param(a) for a in (net.normal(4, 6), net.normal(4, 6), net.normal(4, 6), np.ones((4, 6)))]
    net.add("BatchNormalization", v, *arrays, out="y", spatial=0)
    left(net, net.model("y"), data(3, 4, 6), "BN308", "positions")


def test_the_body_of_an_if_is_left() -> None:
    net = Net(FREE, 4, 6, 6)
    v, flag = net.bn("x", 4, out="a"), net.param(np.array(True))
    inner = Net(FREE, 4, 6, 6)
    gamma, beta, mean, var = net.statistics(4)
    inner.nodes.append(helper.make_node("BatchNormalization", [v, gamma, beta, mean, var], ["inner"], name="n_y"))
    shape = [FREE, 4, 6, 6]
    out = [helper.make_tensor_value_info("inner", TensorProto.FLOAT, shape)]
    other = [helper.make_tensor_value_info("other", TensorProto.FLOAT, shape)]
    bodies = {
        "then_branch": helper.make_graph(inner.nodes, "then", [], out),
        "else_branch": helper.make_graph([helper.make_node("Relu", [v], ["other"])], "else", [], other),
    }
    net.nodes.append(helper.make_node("If", [flag], ["y"], name="n_if", **bodies))
    left(net, net.model("y"), data(3, 4, 6, 6), "BN308", "inside a node")


def test_a_site_behind_an_if_that_reads_a_held_value() -> None:
    """What a body captures is carried over the border between two levels like any input."""
    net = Net(FREE, 4, 6, 6)
    skip = net.add("Relu", net.conv("x", 4, 4))
    v = net.bn(net.conv("x", 4, 4), 4, out="a")
    shape = [FREE, 4, 4, 4]
    branches_ = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, [v, skip], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        )
        for name, op in (("then", "Add"), ("else", "Sub"))
    }
    net.nodes.append(helper.make_node("If", [net.param(np.array(True))], ["chosen"], name="n_if", **branches_))
    net.bn("chosen", 4, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    for memory in (None, 0):
        new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2), memory_bytes=memory)
        assert [s.action for s in sites] == ["recalibrated"] * 2
        assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


def test_a_sequence_is_held_between_levels() -> None:
    net = Net(FREE, 4, 6, 6)
    pair = net.add("SequenceConstruct", "x", net.add("Relu", "x"))
    v = net.bn(net.conv("x", 4, 4, 1), 4, out="a")
    net.bn(net.add("Concat", v, net.add("ConcatFromSequence", pair, axis=1), axis=1), 12, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    for memory in (None, 0):
        new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2), memory_bytes=memory)
        assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


def test_a_norm_of_a_constant_is_left() -> None:
    net = Net(FREE, 4, 4, 4)
    v = net.bn("x", 4, out="a")
    net.nodes.append(
        helper.make_node(
            "BatchNormalization", [net.param(net.normal(1, 4, 4, 4)), *net.statistics(4)], ["c"], name="n_y"
        )
    )
    net.add("Add", v, "c", out="z")
    left(net, net.model("z"), data(3, 4, 4, 4), "BN308", "constant")


def test_globs() -> None:
    model, batches = plain().model("y"), split(data(4, 3, 8, 8), 4)
    _, sites, _ = recalibrate(model, batches, where=["n_a", "n_b"], skip="*b")
    assert [(s.name, s.code) for s in sites] == [("n_a", None), ("n_b", "BN301"), ("n_c", "BN301")]
    with pytest.raises(UsageError, match="no layer matches 'typo'"):
        recalibrate(model, batches, where="typo")


def test_a_folded_model_is_refused() -> None:
    net = Net(FREE, 3, 8, 8)
    net.add("Relu", net.conv("x", 3, 4), out="y")
    with pytest.raises(ModelError, match=r"^net\.onnx has no normalisation with running statistics$") as caught:
        recalibrate(net.model("y"), split(data(4, 3, 8, 8), 4), name="net.onnx")
    assert "bnctl insert" in str(caught.value.hint)
    net = Net(FREE, 3, 8, 8)
    net.add("Add", net.add("Mul", net.conv("x", 3, 4), net.normal(4, 1, 1)), net.normal(4, 1, 1), out="y")
    with pytest.raises(ModelError, match="in 1 affines per channel, they may be merged"):
        recalibrate(net.model("y"), split(data(4, 3, 8, 8), 4))
