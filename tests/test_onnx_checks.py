"""What the other tests of the ONNX engine are built from: small models, and a comparison that must notice a wrong fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bnctl.engines.onnx.apply import apply_fold
from bnctl.engines.onnx.lift import lift
from bnctl.graph.ops import LinearOp
from bnctl.numerics import absorb
from bnctl.plan import parameters
from bnctl.plan.fold import FoldPlan, plan_fold

FREE = "N"


class Net:
    """A model, written down node by node; arrays become initializers. `x` is the input."""

    def __init__(
        self,
        *shape: int | str,
        opset: int = 17,
        ir_version: int = 8,
        dtype: Any = np.float32,
        seed: int = 0,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)
        self.opset, self.ir_version = opset, ir_version
        self.inputs = [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(self.dtype), shape)]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, NDArray[Any]] = {}

    def param(self, array: Any, name: str | None = None, dtype: Any = None) -> str:
        array = np.asarray(array)
        kind = dtype or (self.dtype if array.dtype == np.float64 else array.dtype)
        name = name or f"p{len(self.initializers)}"
        self.initializers[name] = array.astype(kind)
        return name

    def normal(self, *shape: int) -> NDArray[np.float64]:
        return self.rng.normal(0, 1, shape)

    def add(
        self, op: str, *inputs: Any, out: str | None = None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        names = [i if isinstance(i, str) else self.param(i) for i in inputs]
        out = out or f"v{len(self.nodes)}"
        outs = [out, *(f"{out}_{k}" for k in range(1, outputs))]
        self.nodes.append(helper.make_node(op, names, outs, name=f"n_{out}", domain=domain, **attributes))
        return out

    def conv(
        self, x: str, cin: int, cout: int, k: int = 3, *, bias: bool = True, groups: int = 1, **attributes: Any
    ) -> str:
        parameters = [self.normal(cout, cin // groups, k, k) / np.sqrt(cin * k * k / groups)]
        parameters += [self.normal(cout)] if bias else []
        return self.add("Conv", x, *parameters, group=groups, **attributes)

    def statistics(self, channels: int, dtype: Any = None) -> list[str]:
        """Gamma (negative and 0, too), beta, mean and variance (nearly 0 in one channel)."""
        gamma = self.rng.normal(1, 0.5, channels) * self.rng.choice([1, -1], channels)
        var = self.rng.uniform(0.3, 2, channels)
        if channels > 2:
            gamma[0], gamma[1], var[2] = 0, -0.7, 1e-3
        arrays = (gamma, self.normal(channels), self.normal(channels), var)
        return [self.param(a, dtype=dtype) for a in arrays]

    def bn(self, x: str, channels: int, *, out: str | None = None, dtype: Any = None, **attributes: Any) -> str:
        return self.add("BatchNormalization", x, *self.statistics(channels, dtype), out=out, **attributes)

    def proto(self, *outputs: str) -> onnx.ModelProto:
        tensors = [_tensor(name, array) for name, array in self.initializers.items()]
        inputs = list(self.inputs)
        if self.ir_version < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        outs = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", inputs, outs, tensors)
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(d, 1) for d in {n.domain for n in self.nodes} - {""}]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)  # an output must say its shape
        for output, known in zip(proto.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(known)
        return proto

    def model(self, *outputs: str) -> ir.Model:
        return ir.from_proto(self.proto(*outputs))


def _tensor(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    if array.dtype == ml_dtypes.bfloat16:
        return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.view(np.uint16).tobytes(), raw=True)
    return numpy_helper.from_array(array, name)


def run(model: ir.Model, feeds: Mapping[str, NDArray[Any]], *, inner: bool = True) -> dict[str, NDArray[Any]]:
    """Outputs by name, with the runtime's optimisations off; with those of all nodes of the main graph, where `inner`."""
    proto = ir.to_proto(model)
    outputs = [o.name for o in proto.graph.output]
    if inner:
        names = [name for node in proto.graph.node for name in node.output if name and name not in outputs]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def feeds_of(model: ir.Model, batch: int, seed: int = 1) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    found = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.shape is not None and value.dtype is not None
        shape = [d if isinstance(d, int) else batch for d in value.shape]
        dtype = value.dtype.numpy()
        found[str(value.name)] = (rng.integers(0, 5, shape) if dtype.kind in "iu" else rng.normal(0, 1, shape)).astype(
            dtype
        )
    return found


def relative_error(one: NDArray[Any], two: NDArray[Any]) -> float:
    """Largest difference, relative to the root mean square of the first."""
    assert one.shape == two.shape
    one, two = (np.asarray(a, np.float64) for a in (one, two))
    size = float(np.sqrt(np.mean(one**2)))
    return float(np.max(np.abs(one - two), initial=0.0)) / max(size, 1e-30)


def worst_error(before: ir.Model, after: ir.Model, batch: int = 2) -> tuple[float, str]:
    """The largest relative error over outputs, and over all inner values of equal name."""
    feeds = feeds_of(before, batch)
    one, two = run(before, feeds), run(after, feeds)
    assert [v.name for v in before.graph.outputs] == [v.name for v in after.graph.outputs]
    return max(
        (relative_error(one[name], two[name]), name) for name in one if name in two and one[name].dtype.kind == "f"
    )


def codes(plan: FoldPlan) -> dict[str, str | None]:
    return {site.name: site.code for site in plan.sites}


def fold(model: ir.Model) -> tuple[ir.Model, dict[str, str | None]]:
    lifted = lift(model)
    plan = plan_fold(lifted.graph)
    return apply_fold(lifted, plan), codes(plan)


def fold_and_check(
    model: ir.Model, tolerance: float = 2e-5, *, check: bool = True
) -> tuple[ir.Model, dict[str, str | None]]:
    """Fold, and see that the result is valid, computes the same at two batch sizes, and that the original was left alone."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    folded, found = fold(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    if check:
        onnx.checker.check_model(ir.to_proto(folded), full_check=True)
    for batch in (1, 3):
        error, name = worst_error(model, folded, batch)
        assert error <= tolerance, f"{name} is off by {error:.2e} at batch size {batch}"
    return folded, found


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


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


# The controls: a comparison that never fails proves nothing.


def _square_net() -> ir.Model:
    net = Net(FREE, 4, 6, 6)
    return net.model(net.bn(net.conv("x", 4, 4), 4))


def test_the_comparison_accepts_a_right_fold() -> None:
    folded, found = fold_and_check(_square_net())
    assert list(found.values()) == [None]
    assert count(folded, "BatchNormalization") == 0


def test_the_comparison_notices_a_fold_along_the_wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(op: LinearOp, weight: Any, bias: Any, scale: Any, shift: Any, dtype: Any) -> tuple[Any, Any]:
        """Scales the input channels; Cin == Cout, so that no shape complains."""
        return weight * scale.reshape(1, -1, 1, 1), bias * scale + shift

    monkeypatch.setattr(parameters, "absorb_output", wrong)
    with pytest.raises(AssertionError, match="is off by"):
        fold_and_check(_square_net())


def test_the_comparison_notices_a_forgotten_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    right = absorb.absorb_output
    monkeypatch.setattr(parameters, "absorb_output", lambda op, w, b, s, t, dtype: right(op, w, b, s, 0 * t, dtype))
    with pytest.raises(AssertionError, match="is off by"):
        fold_and_check(_square_net())


def test_the_comparison_notices_a_swapped_inner_name() -> None:
    net = Net(FREE, 4, 6, 6)
    net.add("Relu", net.bn(net.conv("x", 4, 4), 4, out="b"), out="y")
    model = net.model("y")
    folded, _ = fold(model)
    relu = next(node for node in folded.graph if node.op_type == "Relu")
    assert relu.inputs[0].name == "b"
    relu.inputs[0].name = "v0"  # the conv's name, whose old value is something else
    error, name = worst_error(model, folded)
    assert (error > 0.1, name) == (True, "v0")
