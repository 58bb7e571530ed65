"""Every opset from 7 to the newest that the onnx package knows, with the operators whose form changed on the way."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, defs, helper
from onnx.reference import ReferenceEvaluator

from test_onnx_checks import FREE, Net, feeds_of, fold, relative_error, run

OPSETS = range(7, defs.onnx_opset_version() + 1)


def _ir_version(opset: int) -> int:
    """The oldest that may carry the opset."""
    return helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


def network(opset: int) -> ir.Model:
    net = Net(FREE, 4, 8, 8, opset=opset, ir_version=_ir_version(opset))

    def axes(op: str, value: str, since: int, numbers: list[int], **attributes: Any) -> str:
        """An operator that takes its axes as an attribute before, and as an input from, the opset `since`."""
        if opset >= since:
            return net.add(op, value, np.array(numbers), **attributes)
        return net.add(op, value, axes=numbers, **attributes)

    v = net.add("Dropout", net.conv("x", 4, 8, bias=False), outputs=2)
    v = net.add("Relu", net.bn(v, 8, out="dropped"))
    v = net.bn(_upsampled(net, net.conv(v, 8, 8, 1)), 8, out="resized")
    v = net.add("Relu", v)
    v = net.bn(_middle(net, net.conv(v, 8, 8, 1)), 8, out="sliced")
    v = net.bn(net.add("Relu", v), 8, out="split")
    first, second = _halves(net, v)
    v = net.add("Add", net.conv(first, 3, 4, 1), net.conv(second, 5, 4, 1))
    v = axes("ReduceMean", v, 18, [2, 3], keepdims=1)
    v = axes("Squeeze", v, 13, [2, 3])
    v = axes("Unsqueeze", net.bn(v, 4, out="pooled"), 13, [2])
    v = axes("Squeeze", v, 13, [2])
    v = net.add("Gemm", net.add("LeakyRelu", v), net.normal(4, 4), net.normal(4), alpha=0.5)
    v = net.add("LeakyRelu", net.bn(v, 4, out="gemm"))
    v = net.add("Add", net.add("MatMul", v, net.normal(4, 4)), net.normal(4))
    net.bn(v, 4, out="y")
    model = net.model("y")
    model.metadata_props["who"] = "me"
    return model


def _upsampled(net: Net, value: str) -> str:
    scales = np.array([1, 1, 2, 2], np.float32)
    if net.opset < 9:
        return net.add("Upsample", value, scales=scales.tolist(), mode="nearest")
    if net.opset < 11:
        return net.add("Upsample" if net.opset < 10 else "Resize", value, scales, mode="nearest")
    roi = np.zeros(0, np.float32)
    return net.add("Resize", value, roi, scales, mode="nearest", coordinate_transformation_mode="asymmetric")


def _middle(net: Net, value: str) -> str:
    if net.opset < 10:
        return net.add("Slice", value, starts=[1], ends=[9], axes=[2])
    return net.add("Slice", value, np.array([1]), np.array([9]), np.array([2]))


def _halves(net: Net, value: str) -> tuple[str, str]:
    sizes = [3, 5]
    form: dict[str, Any] = {"split": sizes} if net.opset < 13 else {}
    first = net.add("Split", value, *([] if form else [np.array(sizes)]), outputs=2, axis=1, **form)
    return first, f"{first}_1"


@cache
def runtime_knows(opset: int) -> bool:
    """Whether this ONNX Runtime runs models of an opset."""
    net = Net(FREE, 4, opset=opset, ir_version=_ir_version(opset))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        proto = net.proto(net.add("Relu", "x")).SerializeToString()
        onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception:  # the runtime's errors share no base class
        return False
    return True


def outputs(model: ir.Model, feeds: Mapping[str, NDArray[Any]], opset: int) -> dict[str, NDArray[Any]]:
    if runtime_knows(opset):
        return run(model, feeds, inner=False)
    names = [str(v.name) for v in model.graph.outputs]
    return dict(zip(names, ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feeds)), strict=True))


@pytest.mark.parametrize("opset", OPSETS)
def test_a_network_of_every_opset(opset: int) -> None:
    model = network(opset)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    folded, found = fold(model)
    proto = ir.to_proto(folded)
    onnx.checker.check_model(proto, full_check=True)
    assert found == dict.fromkeys(
        [f"n_{name}" for name in ("dropped", "resized", "sliced", "split", "pooled", "gemm", "y")]
    )
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)
    for batch in (1, 3):
        feeds = feeds_of(model, batch)
        before, after = outputs(model, feeds, opset), outputs(folded, feeds, opset)
        assert relative_error(before["y"], after["y"]) < 2e-5
    assert [v.name for v in folded.graph.inputs if not v.is_initializer()] == ["x"]
    assert [v.name for v in folded.graph.outputs] == ["y"]
    assert folded.opset_imports == model.opset_imports and folded.metadata_props == model.metadata_props
    assert folded.ir_version == model.ir_version


@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
def test_the_comparison_notices_a_weight_that_is_off(opset: int) -> None:
    model = network(opset)
    folded, _ = fold(model)
    value = next(v for v in folded.graph.initializers.values() if v.shape == (8, 4, 3, 3))
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)
    feeds = feeds_of(model, 2)
    assert relative_error(outputs(model, feeds, opset)["y"], outputs(folded, feeds, opset)["y"]) > 1e-3


def test_a_mask_of_dropout_that_is_read() -> None:
    """Nobody may fold through an operator one of whose other outputs somebody reads."""
    net = Net(FREE, 4, 8, 8, opset=13)
    v = net.add("Dropout", net.conv("x", 4, 4), outputs=2)
    net.bn(v, 4, out="y")
    mask = net.add("Cast", f"{v}_1", to=TensorProto.FLOAT)
    folded, found = fold(net.model("y", mask))
    assert found in ({"n_y": None}, {"n_y": "BN116"})
    feeds = {"x": np.random.default_rng(0).normal(0, 1, (2, 4, 8, 8)).astype(np.float32)}
    before, after = run(net.model("y", mask), feeds, inner=False), run(folded, feeds, inner=False)
    assert max(relative_error(before[name], after[name]) for name in before) < 2e-5
