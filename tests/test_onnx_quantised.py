"""Models that ONNX Runtime's quantiser made: what is quantised is left, what is not is folded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bnctl.engines.onnx.lift import lift
from bnctl.plan.fold import plan_fold
from test_onnx_checks import FREE, Net, count, fold, left, relative_error, run


def network() -> Net:
    """conv, BatchNorm, relu, twice, and a linear layer; the quantiser is told to leave the second convolution."""
    net = Net(FREE, 4, 8, 8)
    net.conv("x", 4, 4, out="quantised")
    v = net.add("Relu", net.bn("quantised", 4, out="first"))
    net.conv(v, 4, 4, out="float")
    v = net.add("Relu", net.bn("float", 4, out="second"))
    v = net.add("Flatten", net.add("GlobalAveragePool", v))
    net.add("Gemm", v, net.normal(4, 3), net.normal(3), out="y")
    return net


def feeds(seed: int, batch: int = 2) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).normal(0, 1, (batch, 4, 8, 8)).astype(np.float32)}


def quantised(tmp_path: Path, form: str, **options: Any) -> ir.Model:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, NDArray[Any]]] = iter([feeds(seed) for seed in range(3)])

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.batches, None)

    source, target = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    onnx.save(network().proto("y"), source)
    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat[form],
        nodes_to_exclude=["n_float", "n_first", "n_second"],
        **options,
    )
    return ir.load(target)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_quantised_model(tmp_path: Path, form: str, per_channel: bool) -> None:
    model = quantised(tmp_path, form, per_channel=per_channel)
    assert any(node.op_type == ("QLinearConv" if form == "QOperator" else "QuantizeLinear") for node in model.graph)
    folded, found = fold(model)
    onnx.checker.check_model(ir.to_proto(folded))
    assert found["n_second"] is None and found["n_first"] is not None
    assert count(folded, "BatchNormalization") == 1
    for batch in (1, 3):
        given = feeds(7, batch)
        assert relative_error(run(model, given, inner=False)["y"], run(folded, given, inner=False)["y"]) < 1e-4


def dequantised(net: Net, *shape: int) -> str:
    values = net.rng.integers(-9, 9, shape).astype(np.int8)
    return net.add("DequantizeLinear", values, np.float32(0.1), np.int8(0))


@pytest.mark.parametrize("way", ["plain", "Transpose", "Reshape", "Identity", "Cast"])
def test_a_weight_that_is_dequantised_and_moved(way: str) -> None:
    net = Net(FREE, 4, 6, 6)
    w = dequantised(net, 4, 4, 3, 3)
    if way == "Transpose":
        w = net.add("Transpose", w, perm=[1, 0, 2, 3])
    elif way == "Reshape":
        w = net.add("Reshape", w, np.array([4, 4, 3, 3]))
    elif way == "Cast":
        w = net.add("Cast", w, to=TensorProto.FLOAT)
    elif way == "Identity":
        w = net.add("Identity", w)
    left(net, "BN111", net.bn(net.add("Conv", "x", w), 4))


def test_a_bias_that_is_dequantised() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.add("Conv", "x", net.normal(4, 4, 3, 3), dequantised(net, 4))
    left(net, "BN111", net.bn(v, 4))


def test_a_matrix_that_is_dequantised() -> None:
    net = Net(FREE, 4)
    left(net, "BN111", net.bn(net.add("MatMul", "x", dequantised(net, 4, 4)), 4))


@pytest.mark.parametrize("op", ["ConvInteger", "MatMulInteger"])
def test_integer_operators(op: str) -> None:
    net = Net(FREE, 4, 6, 6)
    u = net.add("Cast", net.add("Clip", "x", np.float32(0), np.float32(9)), to=TensorProto.UINT8)
    shape = (4, 4, 3, 3) if op == "ConvInteger" else (6, 6)
    v = net.add(op, u, net.rng.integers(0, 9, shape).astype(np.uint8))
    v = net.bn(net.add("Cast", v, to=TensorProto.FLOAT), 4, out="behind")
    net.bn(net.conv(net.add("Relu", v), 4, 4), 4, out="y")
    folded, found = fold(net.model("y"))
    onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    assert found["n_behind"] in {"BN116", "BN111"} and found["n_y"] is None
    given = {"x": np.random.default_rng(0).normal(3, 2, (2, 4, 6, 6)).astype(np.float32)}
    before, after = run(net.model("y"), given), run(folded, given)
    assert relative_error(before["y"], after["y"]) < 2e-5


def test_values_that_are_quantised_between_the_layers_stop_the_way() -> None:
    net = Net(FREE, 4, 6, 6)
    scale, zero = net.param(np.float32(0.05)), net.param(np.uint8(128))
    v = net.add("DequantizeLinear", net.add("QuantizeLinear", net.conv("x", 4, 4), scale, zero), scale, zero)
    net.bn(v, 4, out="y")
    assert [s.code for s in plan_fold(lift(net.model("y")).graph).sites] == ["BN116"]


def test_quantised_weights_in_a_body_and_of_a_body() -> None:
    net = Net(FREE, 4, 6, 6)
    outer = dequantised(net, 4, 4, 3, 3)
    given = [net.statistics(4) for _ in range(2)]
    branches = [
        helper.make_graph(
            [
                *([] if out == "a" else [helper.make_node("Identity", [outer], ["copy"])]),
                helper.make_node("Conv", ["x", outer if out == "a" else "copy"], [f"c_{out}"]),
                helper.make_node("BatchNormalization", [f"c_{out}", *names], [out], name=out),
            ],
            out,
            [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        )
        for out, names in zip(("a", "b"), given, strict=True)
    ]
    net.add("If", net.param(np.array(True)), out="y", then_branch=branches[0], else_branch=branches[1])
    assert {s.name: s.code for s in plan_fold(lift(net.model("y")).graph).sites} == {"a": "BN111", "b": "BN111"}
