"""Runners: inputs in, outputs and layers out, and no trace left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bnctl.data.batches import Batch
from bnctl.errors import ModelError, UsageError
from bnctl.models import Model
from bnctl.runtime import Trace, first_divergence, onnx_source, open_runner
from bnctl.runtime.ahead import Ahead
from bnctl.runtime.ort import OrtRunner
from bnctl.runtime.torch import TorchRunner, evaluating, named_values


def batch(*args: Any, **kwargs: Any) -> Batch:
    return Batch(args=args, kwargs=kwargs, labels=None)


def linear_onnx(dtype: int = TensorProto.FLOAT, rows: int | str = "N") -> onnx.ModelProto:
    """y = relu(x @ w), with w = diag(1, -1)."""
    weight = numpy_helper.from_array(np.diag([1.0, -1.0]).astype(helper.tensor_dtype_to_np_dtype(dtype)), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", dtype, [rows, 2])]
    outputs = [helper.make_tensor_value_info("y", dtype, [rows, 2])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


X = np.array([[1.0, 2.0], [-3.0, -4.0]], np.float32)
Y = np.array([[1.0, 0.0], [0.0, 4.0]], np.float32)


class Counting:
    """A runner that notes on what it was run."""

    def __init__(self) -> None:
        self.runner, self.seen = OrtRunner(ir.from_proto(linear_onnx())), []

    def run(self, given: Batch) -> dict[str, np.ndarray]:
        self.seen.append(given)
        return self.runner.run(given)

    def observe(self, given: Batch, layers: Any) -> Any:
        self.seen.append((given, tuple(layers)))
        return self.runner.observe(given, layers)


class TestAhead:
    def test_the_first_batch_is_run_once(self):
        counting, first = Counting(), batch(X)
        ahead = Ahead(counting, first)
        outputs, inner = ahead.observe(first, ())
        np.testing.assert_array_equal(outputs["y"], Y)
        assert inner == {}
        assert counting.seen == [first]
        ahead.close()

    def test_everything_else_is_the_runner_s(self):
        counting, first, other = Counting(), batch(X), batch(-X)
        ahead = Ahead(counting, first)
        assert "m" in ahead.observe(other, ["m"])[1]
        ahead.run(other)
        ahead.run(first)
        ahead.run(first)  # its outputs were handed out: it is run again
        assert sorted(map(str, counting.seen)) == sorted(map(str, [first, (other, ("m",)), other, first]))

    @pytest.mark.parametrize("given", [batch(X[:, :1]), batch()])
    @pytest.mark.parametrize("close", [True, False])
    def test_a_failure_waits_until_it_is_asked_for(self, given, close):
        ahead = Ahead(OrtRunner(ir.from_proto(linear_onnx())), given)
        if close:
            ahead.close()
        with pytest.raises(ModelError):
            ahead.run(given)
        np.testing.assert_array_equal(ahead.run(batch(X))["y"], Y)


class TestOrt:
    def test_inner_values_outlive_their_session(self):
        values = [OrtRunner(ir.from_proto(linear_onnx())).observe(batch(X * n), ["m"])[1]["m"] for n in range(1, 9)]
        for n, value in enumerate(values, 1):
            np.testing.assert_array_equal(value, X * n * [1, -1])

    def test_an_output_that_is_an_input_has_memory_of_its_own(self):
        proto = linear_onnx()
        proto.graph.node.append(helper.make_node("Identity", ["x"], ["same"]))
        proto.graph.output.append(helper.make_tensor_value_info("same", TensorProto.FLOAT, ["N", 2]))
        given = X.copy()
        found = OrtRunner(ir.from_proto(proto)).run(batch(given))["same"]
        given[:] = 0
        np.testing.assert_array_equal(found, X)

    def test_every_form_of_a_model_gives_the_same(self, tmp_path):
        proto = linear_onnx()
        onnx.save(proto, tmp_path / "m.onnx")
        sources = [tmp_path / "m.onnx", str(tmp_path / "m.onnx"), proto.SerializeToString(), ir.from_proto(proto)]
        for source in sources:
            runner = OrtRunner(source)
            assert runner.kind == "onnx"
            assert runner.precision == "float32"
            assert list(runner.run(batch(X))) == ["y"]
            np.testing.assert_array_equal(runner.run(batch(x=X))["y"], Y)

    def test_external_data_and_models_too_large_for_protobuf(self, tmp_path, monkeypatch):
        onnx.save(linear_onnx(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
        np.testing.assert_array_equal(OrtRunner(tmp_path / "m.onnx").run(batch(X))["y"], Y)
        external = ir.load(tmp_path / "m.onnx")
        np.testing.assert_array_equal(OrtRunner(external).observe(batch(X), ["y"])[1]["y"], Y)
        monkeypatch.setattr(onnx_source, "INLINE_BYTES", 1)
        np.testing.assert_array_equal(OrtRunner(ir.from_proto(linear_onnx())).observe(batch(X), ["y"])[1]["y"], Y)

    def test_one_pass_gives_outputs_and_layers(self):
        outputs, layers = OrtRunner(linear_onnx().SerializeToString()).observe(batch(X), ["m", "y", "other"])
        np.testing.assert_array_equal(outputs["y"], Y)
        np.testing.assert_array_equal(layers["m"], X * [1, -1])
        np.testing.assert_array_equal(layers["y"], Y)
        assert (list(outputs), sorted(layers)) == (["y"], ["m", "y"])

    def test_layers_come_in_order_and_leave_the_model_alone(self):
        model = ir.from_proto(linear_onnx())
        trace = OrtRunner(model).trace(batch(X))
        assert list(trace.values) == ["m", "y"]
        assert trace.parents == {"m": ("x", "w"), "y": ("m",)}
        assert trace.outputs == ("y",)
        assert len(model.graph.outputs) == 1

    def test_values_read_inside_a_subgraph_are_parents(self):
        branch = helper.make_graph(
            [helper.make_node("Neg", ["a"], ["n"])],
            "b",
            [],
            [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)],
        )
        nodes = [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        ]
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ]
        graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])])
        model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
        trace = OrtRunner(model).trace(batch(np.ones(2, np.float32), c=np.array(True)))
        assert "a" in trace.parents["y"]
        np.testing.assert_array_equal(trace.values["y"], [-1, -1])

    @pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE])
    def test_floats_are_cast_to_what_the_input_says(self, dtype):
        runner = OrtRunner(linear_onnx(dtype).SerializeToString())
        found = runner.run(batch(X.astype(np.float64)))["y"]
        assert found.dtype == helper.tensor_dtype_to_np_dtype(dtype)
        np.testing.assert_array_equal(found, Y)
        assert runner.precision == found.dtype.name

    def test_bfloat16_goes_in_and_comes_out_as_float32(self):
        nodes = [helper.make_node("Cast", ["x"], ["m"], to=1), helper.make_node("Cast", ["m"], ["y"], to=16)]
        values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["N", 2]) for name in "xy"]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        found = OrtRunner(model.SerializeToString()).run(batch(X + 1e-4))["y"]
        np.testing.assert_array_equal(found, (X + 1e-4).astype(ml_dtypes.bfloat16).astype(np.float32))
        assert found.dtype == np.float32

    def test_torch_tensors_are_taken(self):
        np.testing.assert_array_equal(OrtRunner(linear_onnx().SerializeToString()).run(batch(torch.tensor(X)))["y"], Y)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (batch(), "no value for input 'x'"),
            (batch(X, X), "takes 1 inputs, got 2"),
            (batch(z=X), "input 'z' is unknown"),
            (batch(X, x=X), "input 'x' is given twice"),
            (batch(X[:, :1]), r"expects x: float32 \['N', 2\], got shape \[2, 1\]"),
            (batch(X[0]), r"got shape \[2\]"),
            (batch(X.astype(np.uint8)), "got uint8, which cannot be cast"),
            (batch(X.astype(np.float64) * 1e300), "got float64, which cannot be cast"),
            (batch(["a", X]), "got list"),
        ],
    )
    def test_wrong_inputs_are_named(self, given, message):
        with pytest.raises(ModelError, match=message) as caught:
            OrtRunner(linear_onnx().SerializeToString()).run(given)
        assert caught.value.hint

    def test_unusable_models_and_devices(self, tmp_path):
        with pytest.raises(ModelError, match=r"missing\.onnx"):
            OrtRunner(tmp_path / "missing.onnx")
        with pytest.raises(ModelError, match="cannot load"):
            OrtRunner(b"not a model")
        with pytest.raises(UsageError, match="'abacus'"):
            OrtRunner(linear_onnx().SerializeToString(), device="abacus")

    def test_failing_inside_is_an_error_of_the_model(self):
        shape = numpy_helper.from_array(np.array([2, 2], np.int64), "shape")
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
        graph = helper.make_graph(
            [helper.make_node("Reshape", ["x", "shape"], ["y"])], "g", value[:1], value[1:], [shape]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        runner = OrtRunner(model.SerializeToString(), name="baked.onnx")
        runner.run(batch(X))
        with pytest.raises(ModelError, match=r"baked\.onnx fails on inputs of shape"):
            runner.run(batch(X[:1]))


@dataclass
class Pair:
    left: Any
    right: Any


class Nested(nn.Module):
    def forward(self, pair: Pair, *, extra: dict[str, Any]) -> dict[str, Any]:
        total = pair.left + pair.right + extra["more"]
        return {"total": total, "pairs": [Pair(total, 2 * total), (total.bfloat16(), "text", None)], "n": 3}


class Residual(nn.Module):
    """A branch that runs after a fault in the other one, an in-place activation, a reused module, functional glue."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.side, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        main = self.relu(self.b(self.relu(self.a(x))))
        main += self.side(x)
        return self.last(torch.cat([main, main], 1)[:, :4])


@pytest.fixture
def residual() -> Residual:
    torch.manual_seed(0)
    return Residual()


FOUR = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class TestTorch:
    def test_nested_inputs_and_outputs(self):
        found = TorchRunner(Nested()).run(batch(Pair(X, X), extra={"more": X}))
        assert list(found) == ["total", "pairs.0.left", "pairs.0.right", "pairs.1.0", "n"]
        np.testing.assert_array_equal(found["pairs.0.right"], 6 * X)
        assert found["pairs.1.0"].dtype == np.float32
        assert found["n"] == 3

    def test_a_single_tensor_is_called_out_and_a_tuple_is_counted(self):
        assert list(TorchRunner(nn.Identity()).run(batch(X))) == ["out"]
        assert [name for name, _ in named_values((torch.ones(1), {"boxes": torch.ones(1)}))] == ["0", "1.boxes"]

    def test_arrays_take_the_type_of_the_module(self):
        module = nn.Linear(2, 2).double()
        runner = TorchRunner(module)
        assert runner.run(batch(X))["out"].dtype == np.float64
        assert runner.precision == "float64"
        assert TorchRunner(nn.Linear(2, 2).bfloat16()).precision == "bfloat16"

    def test_modes_statistics_and_inputs_are_left_alone(self):
        module = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(inplace=True), nn.Dropout())
        module[2].eval()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        x = X.copy()
        TorchRunner(nn.Sequential(nn.ReLU(inplace=True))).run(batch(x))
        np.testing.assert_array_equal(x, X)
        runner = TorchRunner(module)
        runner.observe(batch(X), ["0", "1"])
        np.testing.assert_array_equal(runner.run(batch(X))["out"], runner.run(batch(X))["out"])
        assert [m.training for m in module.modules()] == [True, True, True, False]
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())

    def test_modes_come_back_when_the_model_raises(self):
        class Broken(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                assert not self.training
                raise IndexError("too far")

        module = Broken()
        hooks = len(nn.modules.module._global_forward_hooks)
        for method in (TorchRunner(module).run, TorchRunner(module).trace):
            with pytest.raises(
                ModelError, match=r"Broken fails on inputs \(torch.float32\[2, 2\]\): IndexError: too far"
            ):
                method(batch(X))
        with pytest.raises(RuntimeError, match="own"), evaluating(module):
            raise RuntimeError("own")
        assert module.training
        assert len(nn.modules.module._global_forward_hooks) == hooks

    def test_layers_are_copies_by_path_with_calls_counted(self, residual):
        values = TorchRunner(residual).trace(batch(FOUR)).values
        assert list(values) == ["a", "relu", "b", "relu#2", "side", "last"]
        assert (values["a"] < 0).any()  # not overwritten by the ReLU in place
        assert (values["relu"] >= 0).all()

    def test_one_pass_gives_outputs_and_layers(self, residual):
        runner = TorchRunner(residual)
        outputs, layers = runner.observe(batch(FOUR), ["relu", "last"])
        trace = runner.trace(batch(FOUR)).values
        assert sorted(layers) == ["last", "relu", "relu#2"]
        assert all(np.array_equal(value, trace[name]) for name, value in layers.items())
        assert all(np.array_equal(value, outputs[name]) for name, value in runner.run(batch(FOUR)).items())

    def test_data_flow_is_followed_through_functions_and_writes_in_place(self, residual):
        trace = TorchRunner(residual).trace(batch(FOUR))
        assert trace.parents["b"] == ("relu",)
        assert trace.parents["side"] == ()
        assert set(trace.parents["last"]) == {"relu#2", "side"}
        assert trace.outputs == ("last",)

    def test_no_tensor_is_an_error(self):
        class Silent(nn.Module):
            def forward(self, x: torch.Tensor) -> None: ...

        with pytest.raises(ModelError, match="no tensor"):
            TorchRunner(Silent()).run(batch(X))

    def test_unknown_device(self):
        with pytest.raises(UsageError, match="abacus"):
            TorchRunner(nn.Identity(), device="abacus")


def test_open_runner_picks_by_kind():
    assert open_runner(Model("onnx", ir.from_proto(linear_onnx()), "m.onnx")).kind == "onnx"
    assert open_runner(Model("torch", nn.Identity(), "m")).kind == "torch"


def test_prepared_calls_run_the_model(residual):
    for runner, x in ((OrtRunner(linear_onnx().SerializeToString()), X), (TorchRunner(residual), FOUR)):
        with runner.prepared(batch(x)) as call:
            assert call() is not None


class TestFirstDivergence:
    @staticmethod
    def trace(**values: float) -> Trace:
        """A chain of layers."""
        names = list(values)
        parents = {name: (previous,) for name, previous in zip(names, ["x", *names], strict=False)}
        return Trace({name: np.full(3, float(value)) for name, value in values.items()}, parents, (names[-1],))

    def test_a_difference_that_heals_is_legitimate(self):
        baseline = self.trace(conv=1, bn=2, relu=3, fc=4)
        assert first_divergence(baseline, self.trace(conv=2, bn=2, relu=3, fc=4), 1e-6) is None

    def test_the_first_of_those_that_persist(self):
        baseline = self.trace(conv=1, bn=2, conv2=3, relu=3, fc=4)
        candidate = self.trace(conv=2, bn=2, conv2=3.3, relu=3.3, fc=5)
        found = first_divergence(baseline, candidate, 1e-6)
        assert found is not None
        assert found.name == "conv2"
        assert (found.max_abs, found.max_rel) == pytest.approx((0.3, 0.1))

    def test_layers_that_only_one_side_has_are_looked_through(self):
        baseline = self.trace(conv=1, bn=2, relu=3)
        candidate = self.trace(conv=2.5, relu=3.5)
        found = first_divergence(baseline, candidate, 1e-6)
        assert found is not None
        assert found.name == "conv"

    @pytest.mark.parametrize("faulty", ["a", "b", "side", "last"])
    def test_a_fault_in_either_branch_of_a_real_model(self, residual, faulty):
        baseline = TorchRunner(residual).trace(batch(FOUR))
        with torch.no_grad():
            getattr(residual, faulty).bias += 0.5
        found = first_divergence(baseline, TorchRunner(residual).trace(batch(FOUR)), 1e-5)
        assert found is not None
        assert found.name == faulty
