"""Several domains, and initializers that a caller may override."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from bnctl.engines.onnx.freeze import frozen
from bnctl.engines.onnx.lift import lift
from bnctl.graph import ops
from bnctl.plan.fold import plan_fold
from test_onnx_checks import FREE, Net, count, fold, fold_and_check, left, relative_error, run

# Domains


def test_the_default_domain_spelled_out() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.conv("x", 4, 4), 4, out="y")
    proto = net.proto("y")
    for node in proto.graph.node:
        node.domain = "ai.onnx"
    proto.opset_import[0].domain = "ai.onnx"
    folded, found = fold_and_check(ir.from_proto(proto))
    assert list(found.values()) == [None] and count(folded, "BatchNormalization") == 0


def test_the_opset_of_the_default_domain_spelled_out_is_read() -> None:
    from bnctl.errors import ModelError

    proto = Net(FREE, 4, 6, 6, opset=6).proto()
    proto.opset_import[0].domain = "ai.onnx"
    with pytest.raises(ModelError, match="opset 6"):
        lift(ir.from_proto(proto))


@pytest.mark.parametrize(
    ("domain", "op_type", "attributes"),
    [
        ("com.microsoft", "FusedConv", {"activation": "Relu", "kernel_shape": [3, 3]}),
        ("com.microsoft", "Conv", {}),
        ("ai.onnx.ml", "Conv", {}),
        ("Paddle", "Conv", {}),
        ("", "NobodyKnows", {}),
    ],
)
def test_operators_of_other_domains_are_opaque_whatever_they_are_called(
    domain: str, op_type: str, attributes: dict[str, Any]
) -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add(op_type, "x", net.normal(4, 4, 3, 3), net.normal(4), domain=domain, **attributes)
    v = net.add("Relu", net.bn(v, 4, out="behind"))
    net.bn(net.conv(v, 4, 4), 4, out="y")
    model = net.model("y")
    net.initializers.clear()
    declared = ir.Shape([None, 4, 6, 6])
    next(n for n in model.graph if n.op_type == op_type).outputs[0].shape = declared
    lifted = lift(model)
    assert isinstance(lifted.graph.nodes[0].op, ops.Opaque)
    assert {s.name: s.code for s in plan_fold(lifted.graph).sites} == {"n_behind": "BN116", "n_y": None}


def test_a_batch_norm_of_another_domain_is_no_batch_norm() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.conv("x", 4, 4)
    net.add("BatchNormalization", v, *net.statistics(4), domain="com.microsoft", out="y")
    assert plan_fold(lift(net.model("y")).graph).sites == ()


def test_a_local_function_that_is_called_like_an_operator() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.add("Identity", net.conv("x", 4, 4)), 4, out="y")
    proto = net.proto("y")
    body = [helper.make_node("Relu", ["a"], ["b"])]
    proto.functions.append(helper.make_function("", "Identity", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    folded, found = fold(ir.from_proto(proto))
    assert list(found.values()) == ["BN116"] and count(folded, "BatchNormalization") == 1


def test_a_fused_convolution_that_the_runtime_runs() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("FusedConv", "x", net.normal(4, 4, 3, 3), net.normal(4), domain="com.microsoft", activation="Relu")
    net.bn(net.conv(net.bn(v, 4, out="behind"), 4, 4, pads=[1, 1, 1, 1]), 4, out="y")
    proto = net.proto("y")
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4))
    model = ir.from_proto(proto)
    folded, found = fold(model)
    assert found == {"n_behind": "BN116", "n_y": None}
    feeds = {"x": np.random.default_rng(0).normal(0, 1, (3, 4, 6, 6)).astype(np.float32)}
    assert relative_error(run(model, feeds)["y"], run(folded, feeds)["y"]) < 2e-5


# Overridable initializers


def overridable(**options: Any) -> onnx.ModelProto:
    """Weight and mean are inputs of the graph with defaults."""
    net = Net(FREE, 4, 6, 6, **options)
    w = net.param(net.normal(4, 4, 3, 3), "w")
    net.bn(net.add("Conv", "x", w), 4, out="y")
    proto = net.proto("y")
    if net.ir_version >= 4:
        mean = proto.graph.node[-1].input[3]
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4, 3, 3]))
        proto.graph.input.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, [4]))
    proto.metadata_props.add(key="who", value="me")
    return proto


def test_frozen_initializers_are_constants() -> None:
    model = ir.from_proto(overridable())
    original = ir.to_proto(model).SerializeToString(deterministic=True)
    assert [s.code for s in plan_fold(lift(model).graph).sites] == ["BN112"]
    result = frozen(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == original
    assert [v.name for v in result.graph.inputs] == ["x"] and result.metadata_props == model.metadata_props
    assert result.graph.initializers.keys() == model.graph.initializers.keys()
    folded, found = fold_and_check(result)
    assert list(found.values()) == [None] and count(folded, "BatchNormalization") == 0


def test_freezing_shares_the_tensors() -> None:
    model = ir.from_proto(overridable())
    assert frozen(model).graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def test_before_ir_version_4_there_is_nothing_to_freeze() -> None:
    model = ir.from_proto(overridable(opset=8, ir_version=3))
    assert [v.name for v in frozen(model).graph.inputs] == [v.name for v in model.graph.inputs]
    assert [s.code for s in plan_fold(lift(model).graph).sites] == [None]


def test_freezing_a_model_without_such_inputs_changes_nothing() -> None:
    net = Net(FREE, 4, 6, 6)
    model = net.model(net.bn(net.conv("x", 4, 4), 4))
    assert ir.to_proto(frozen(model)) == ir.to_proto(model)


def test_a_shape_that_a_caller_can_override_is_not_believed() -> None:
    net = Net(FREE, 4, 4, 4)
    target = net.param(np.array([0, 4, 16]), "target")
    v = net.add("Reshape", net.conv("x", 4, 4, 1), target)
    net.bn(v, 4, out="y")
    proto = net.proto("y")
    proto.graph.input.append(helper.make_tensor_value_info("target", TensorProto.INT64, [3]))
    model = ir.from_proto(proto)
    assert [s.code for s in plan_fold(lift(model).graph).sites] == ["BN116"]
    assert [s.code for s in plan_fold(lift(frozen(model)).graph).sites] == [None]


# Quantised models are in test_onnx_quantised.py


def test_a_mystery_between_layers_is_left_alone() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("Erf", net.conv("x", 4, 4))
    left(net, "BN103", net.add("Relu", net.bn(v, 4)))
