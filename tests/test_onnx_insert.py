"""Inserting BatchNormalization into ONNX models: the function stays, and folding gives the model back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from bnctl.engines.onnx import insert
from bnctl.engines.onnx.calibrate import calibrate
from bnctl.engines.onnx.insert import apply_insert
from bnctl.engines.onnx.lift import lift
from bnctl.errors import DataError
from bnctl.numerics.moments import Moments
from bnctl.plan.insert import plan_insert
from test_onnx_checks import FREE, Net, count, feeds_of, fold, relative_error, run, worst_error

EPS = 1e-3


def start(model: ir.Model) -> Callable[[Any], Mapping[str, NDArray[Any]]]:
    return lambda batch: run(model, {"x": batch}, inner=False)


def inserted(model: ir.Model, batches: list[NDArray[Any]] | None = None, eps: float = EPS) -> ir.Model:
    lifted = lift(model)
    sites = [site for site in plan_insert(lifted.graph) if site.obstacle is None]
    names = [lifted.graph.values[site.values[0]].name for site in sites]
    moments = calibrate(model, names, batches or [feeds_of(model, 4)["x"], feeds_of(model, 1, seed=2)["x"]], start)
    return apply_insert(lifted, sites, {site.name: moments[name] for site, name in zip(sites, names, strict=True)}, eps)


def conv_net(**options: Any) -> Net:
    net = Net(FREE, 3, 8, 8, **options)
    v = net.add("Relu", net.conv("x", 3, 4, bias=False))
    v = net.add("Relu", net.add("Conv", v, net.normal(6, 4, 3, 3), net.normal(6), strides=[2, 2]))
    net.add("Gemm", net.add("Flatten", net.add("GlobalAveragePool", v)), net.normal(6, 3), net.normal(3), out="y")
    return net


def linear_net(**options: Any) -> Net:
    net = Net(FREE, 4, **options)
    v = net.add("Relu", net.add("Add", net.add("MatMul", "x", net.normal(4, 5)), net.normal(5)))
    v = net.add("Tanh", net.add("MatMul", v, net.normal(5, 6)))
    net.add("Gemm", net.add("Sigmoid", net.add("Gemm", v, net.normal(6, 6), alpha=0.5)), net.normal(6, 3), out="y")
    return net


@pytest.mark.parametrize("build", [conv_net, linear_net])
def test_the_function_stays_and_folding_gives_the_model_back(build: Callable[..., Net]) -> None:
    model = build().model("y")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with_norms = inserted(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    onnx.checker.check_model(ir.to_proto(with_norms), full_check=True)
    expected = {conv_net: 2, linear_net: 3}[build]
    assert count(with_norms, "BatchNormalization") == expected
    for batch in (1, 3):
        assert worst_error(model, with_norms, batch)[0] < 2e-5
    folded, found = fold(with_norms)
    assert set(found.values()) == {None} and count(folded, "BatchNormalization") == 0
    for batch in (1, 3):
        assert worst_error(model, folded, batch)[0] < 2e-5


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 21, 23])
def test_opsets(opset: int) -> None:
    model = conv_net(opset=opset, ir_version=3 if opset < 9 else 8).model("y")
    with_norms = inserted(model)
    onnx.checker.check_model(ir.to_proto(with_norms), full_check=True)
    assert worst_error(model, with_norms)[0] < 2e-5


@pytest.mark.parametrize("opset", [13, 17])
def test_half_precision(opset: int) -> None:
    model = conv_net(opset=opset, dtype=np.float16).model("y")
    with_norms = inserted(model)
    onnx.checker.check_model(ir.to_proto(with_norms), full_check=True)
    node = next(n for n in with_norms.graph if n.op_type == "BatchNormalization")
    assert {v.dtype for v in node.inputs[1:] if v is not None} == {
        ir.DataType.FLOAT if opset >= 15 else ir.DataType.FLOAT16
    }
    assert worst_error(model, with_norms)[0] < 3e-2


def test_a_forgotten_eps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: gamma = sqrt(var) is not the identity."""
    monkeypatch.setattr(insert, "identity_parameters", lambda mean, var, eps: (np.sqrt(var), mean))
    model = conv_net().model("y")
    assert worst_error(model, inserted(model, eps=0.1))[0] > 1e-2


def test_values_behind_keep_their_names_and_the_one_before_gets_a_new_one() -> None:
    net = Net(FREE, 3, 8, 8)
    v = net.conv("x", 3, 4)
    net.add("Conv", net.add("Relu", v), net.normal(2, 4, 1, 1), out="y")
    with_norms = inserted(net.model("y", v))
    assert [n.op_type for n in with_norms.graph] == ["Conv", "BatchNormalization", "Relu", "Conv"]
    assert [n.outputs[0].name for n in with_norms.graph] == ["v0_before_BatchNormalization", "v0", "v1", "y"]
    assert [o.name for o in with_norms.graph.outputs] == ["y", "v0"]


def test_statistics_are_those_of_the_data() -> None:
    model = conv_net().model("y")
    batches = [feeds_of(model, n, seed=n)["x"] for n in (5, 2, 1)]
    with_norms = inserted(model, batches)
    lifted = lift(with_norms)
    sites = [n for n in lifted.graph.nodes if lifted.statistics(n) is not None]
    values = run(model, {"x": np.concatenate(batches)})
    for node, name in zip(sites, ("v0", "v2"), strict=True):
        statistics = lifted.statistics(node)
        assert statistics is not None
        assert np.allclose(statistics.mean, values[name].mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        assert np.allclose(statistics.var, values[name].var((0, 2, 3)), rtol=1e-5)
        assert np.allclose(statistics.gamma, np.sqrt(statistics.var + EPS), rtol=1e-6)
        assert statistics.eps == float(np.float32(EPS))


def test_other_nodes_have_no_statistics() -> None:
    lifted = lift(conv_net().model("y"))
    assert all(lifted.statistics(node) is None for node in lifted.graph.nodes)


def test_calibration_merges_uneven_batches() -> None:
    model = conv_net().model("y")
    whole = feeds_of(model, 7)["x"]
    parts = calibrate(model, ["v0"], [whole[:4], whole[4:6], whole[6:]], start)["v0"]
    one = Moments.of(run(model, {"x": whole})["v0"], axis=1)
    assert relative_error(one.mean, parts.mean) < 1e-6
    assert relative_error(one.variance(), parts.variance()) < 1e-6


def test_calibration_without_data() -> None:
    with pytest.raises(DataError, match="no batch"):
        calibrate(conv_net().model("y"), ["v0"], [], start)


def test_calibration_on_nan() -> None:
    model = conv_net().model("y")
    with pytest.raises(DataError, match=r"batch 1: v0 is not finite"):
        calibrate(model, ["v0"], [feeds_of(model, 2)["x"], np.full((2, 3, 8, 8), np.nan, np.float32)], start)
