"""Local functions: what holds something to fold is inlined, everything else stays a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from bnctl.engines.onnx.lift import lift
from bnctl.plan.fold import plan_fold
from test_onnx_checks import FREE, Net, count, feeds_of, fold, relative_error, run

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
PARAMETERS = ["w", "gamma", "beta", "mean", "var"]


def function(
    name: str,
    inputs: Sequence[str],
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 17,
    attributes: Sequence[str] = (),
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, inputs, outputs, nodes, opsets, attributes)


def conv_bn() -> onnx.FunctionProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", *PARAMETERS[1:]], ["y"], name="bn"),
    ]
    return function("ConvBn", ["x", *PARAMETERS], nodes)


def activation() -> onnx.FunctionProto:
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    return function("Swish", ["x"], nodes)


def model_of(net: Net, functions: Sequence[onnx.FunctionProto], *outputs: str) -> ir.Model:
    proto = net.proto(*outputs)
    proto.functions.extend(functions)
    for output in proto.graph.output:
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [None] * 4))
    proto.metadata_props.add(key="who", value="me")
    return ir.from_proto(proto)


def check(model: ir.Model) -> tuple[ir.Model, dict[str, str | None]]:
    """Fold; valid, the same ends, and the same results by two implementations."""
    original = ir.to_proto(model).SerializeToString(deterministic=True)
    folded, found = fold(model)
    proto = ir.to_proto(folded)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == original
    onnx.checker.check_model(proto, full_check=True)
    for ends in ("inputs", "outputs"):
        assert [v.name for v in getattr(folded.graph, ends)] == [v.name for v in getattr(model.graph, ends)]
    assert folded.metadata_props == model.metadata_props and folded.opset_imports == model.opset_imports
    for batch in (1, 3):
        feeds = feeds_of(model, batch)
        wanted = run(model, feeds, inner=False)
        second = dict(zip(wanted, ReferenceEvaluator(proto).run(None, dict(feeds)), strict=True))
        for answer in (run(folded, feeds, inner=False), second):
            for name, value in wanted.items():
                assert relative_error(value, answer[name]) < 2e-5, name
    return folded, found


def parameters(net: Net, cin: int = 4, cout: int = 4) -> list[Any]:
    return [net.normal(cout, cin, 3, 3), *net.statistics(cout)]


def test_layers_in_a_function_are_folded_and_other_functions_stay() -> None:
    net = Net(FREE, 4, 8, 8)
    v = net.add("ConvBn", "x", *parameters(net), domain="local")
    v = net.add("Swish", v, domain="local")
    net.add("ConvBn", v, *parameters(net), domain="local", out="y")
    folded, found = check(model_of(net, [conv_bn(), activation()], "y"))
    assert set(found.values()) == {None} and len(found) == 2
    assert [f.name for f in folded.functions.values()] == ["Swish"]
    assert [n.op_type for n in folded.graph] == ["Conv", "Swish", "Conv"]


def test_a_function_in_a_function() -> None:
    net = Net(FREE, 4, 8, 8)
    call = [
        helper.make_node("ConvBn", ["x", *PARAMETERS], ["c"], domain="local"),
        helper.make_node("Swish", ["c"], ["y"], domain="local"),
    ]
    net.add("Block", "x", *parameters(net), domain="local", out="y")
    functions = [function("Block", ["x", *PARAMETERS], call), conv_bn(), activation()]
    folded, found = check(model_of(net, functions, "y"))
    assert list(found.values()) == [None]
    assert [f.name for f in folded.functions.values()] == ["Swish"]


def test_a_convolution_in_a_function_and_its_batch_norm_outside() -> None:
    net = Net(FREE, 4, 8, 8)
    w, *stats = parameters(net)
    inner = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")]
    v = net.add("Only", "x", w, domain="local")
    net.add("BatchNormalization", v, *stats, out="y")
    folded, found = check(model_of(net, [function("Only", ["x", "w"], inner)], "y"))
    assert found == {"n_y": None} and not folded.functions


def test_a_convolution_that_nothing_goes_into_stays_a_function() -> None:
    net = Net(FREE, 4, 8, 8)
    w, *stats = parameters(net)
    inner = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    v = net.add("Only", "x", w, domain="local")
    v = net.add("Relu", net.add("BatchNormalization", net.conv(v, 4, 4), *stats))
    folded, found = check(model_of(net, [function("Only", ["x", "w"], inner)], v))
    assert list(found.values()) == [None] and len(folded.functions) == 1


def test_a_channel_affine_behind_a_convolution_in_a_function() -> None:
    net = Net(FREE, 4, 8, 8)
    inner = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Mul", ["c", "s"], ["y"], name="scale")]
    net.add("Scaled", "x", net.normal(4, 4, 3, 3), net.normal(1, 4, 1, 1), domain="local", out="y")
    folded, found = check(model_of(net, [function("Scaled", ["x", "w", "s"], inner)], "y"))
    assert list(found.values()) == [None]
    assert [n.op_type for n in folded.graph] == ["Conv"]


def test_an_attribute_of_the_call_reaches_the_operator() -> None:
    net = Net(FREE, 4, 8, 8)
    node = helper.make_node("BatchNormalization", ["c", *PARAMETERS[1:]], ["y"])
    node.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
    inner = [helper.make_node("Conv", ["x", "w"], ["c"]), node]
    net.add("ConvBn", "x", *parameters(net), domain="local", out="y", eps=0.5)
    _, found = check(model_of(net, [function("ConvBn", ["x", *PARAMETERS], inner, attributes=["eps"])], "y"))
    assert list(found.values()) == [None]


def test_a_function_called_in_a_body() -> None:
    net = Net(FREE, 4, 8, 8)
    net.inputs.append(helper.make_tensor_value_info("flag", TensorProto.FLOAT, []))
    given = [[i if isinstance(i, str) else net.param(i) for i in parameters(net)] for _ in range(2)]
    branches = [
        helper.make_graph(
            [helper.make_node("ConvBn", ["x", *names], [out], domain="local")],
            out,
            [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * 4)],
        )
        for out, names in zip(("a", "b"), given, strict=True)
    ]
    net.add("If", net.add("Greater", "flag", np.float64(0)), out="y", then_branch=branches[0], else_branch=branches[1])
    model = model_of(net, [conv_bn()], "y")
    model.opset_imports["local"] = 1
    folded, found = check(model)
    assert list(found.values()) == [None, None] and not folded.functions


def test_a_function_with_an_if_in_it() -> None:
    net = Net(FREE, 4, 8, 8)
    bodies = {
        f"{key}_branch": helper.make_graph(
            [
                helper.make_node("Conv", ["x", "w"], ["c"]),
                helper.make_node("BatchNormalization", ["c", *PARAMETERS[1:]], [key]),
            ],
            key,
            [],
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, [None] * 4)],
        )
        for key in ("then", "else")
    }
    inner = [helper.make_node("If", ["p"], ["y"], **bodies)]
    net.add("Choice", "x", *parameters(net), net.param(np.array(True)), domain="local", out="y")
    folded, found = check(model_of(net, [function("Choice", ["x", *PARAMETERS, "p"], inner)], "y"))
    assert list(found.values()) == [None, None] and not folded.functions
    assert count(folded, "If") == 1


def test_a_function_of_another_opset_stays() -> None:
    net = Net(FREE, 4, 8, 8)
    net.add("ConvBn", "x", *parameters(net), domain="local", out="y")
    proto = conv_bn()
    proto.opset_import[0].version = 15
    plan = plan_fold(lift(model_of(net, [proto], "y")).graph)
    assert [(s.name, s.code) for s in plan.sites] == [("bn", "BN120")]


@pytest.mark.parametrize("outputs", [("x", "y"), ("y", "y")])
def test_a_function_that_hands_a_value_on_twice_stays(outputs: tuple[str, ...]) -> None:
    net = Net(FREE, 4, 8, 8)
    net.add("ConvBn", "x", *parameters(net), domain="local", outputs=2, out="y")
    inner = function("ConvBn", ["x", *PARAMETERS], conv_bn().node, outputs)
    plan = plan_fold(lift(model_of(net, [inner], "y", "y_1")).graph)
    assert [s.code for s in plan.sites] == ["BN120"]


def test_functions_with_nothing_to_fold_leave_the_model_as_it_is() -> None:
    net = Net(FREE, 4, 8, 8)
    model = model_of(net, [activation()], net.add("Swish", net.conv("x", 4, 4), domain="local"))
    assert [f.name for f in lift(model).model.functions.values()] == ["Swish"]
