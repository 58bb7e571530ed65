"""Folding ONNX models, forms of files: names, constants, external data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnctl.cli.app import run as cli
from bnctl.data.batches import Batch
from bnctl.engines.onnx.engine import OnnxEngine
from bnctl.engines.onnx.lift import lift
from bnctl.errors import ModelError
from bnctl.models.model import Model
from bnctl.plan.fold import plan_fold
from bnctl.plan.insert import plan_insert
from test_onnx_checks import FREE, Net, all_folded, count, fold, fold_and_check, left, run, worst_error

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


def test_before_ir_version_4_initializers_that_are_no_inputs(tmp_path: Path) -> None:
    """Such a file is not valid, and runs all the same: they are listed when it is opened."""
    net = Net(FREE, 4, 6, 6, opset=8, ir_version=3)
    v = net.add("Relu", net.bn(net.conv("x", 4, 4), 4))
    net.add("Conv", v, net.normal(2, 4, 1, 1), out="y")
    proto = net.proto("y")
    del proto.graph.input[1:]
    with pytest.raises(onnx.checker.ValidationError, match="not in graph input"):
        onnx.checker.check_model(proto)
    path, folded = tmp_path / "old.onnx", tmp_path / "folded.onnx"
    path.write_bytes(proto.SerializeToString())
    assert cli(["fold", str(path), "-o", str(folded)]) == 0
    written = onnx.load(folded)
    onnx.checker.check_model(written)
    assert written.ir_version == 3
    assert [node.op_type for node in written.graph.node] == ["Conv", "Relu", "Conv"]
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)
    before, after = (run(ir.from_proto(p), {"x": x}, inner=False)["y"] for p in (proto, written))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


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


def test_a_model_that_cannot_be_run_needs_no_check_where_nothing_is_folded(tmp_path: Path, cli: Any) -> None:
    """ONNX Runtime does not know the operator; with a layer to fold there is no way around it."""
    for folds in (False, True):
        net = Net(FREE, 4, 4, 4)
        x = net.bn(net.conv("x", 4, 4, 1), 4) if folds else net.add("Relu", "x")
        net.add("Strange", x, out="y")
        proto = net.proto("y")
        proto.graph.node[-1].domain = "nobody.knows"
        proto.opset_import.append(helper.make_opsetid("nobody.knows", 1))
        proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, None, None]))
        onnx.save(proto, tmp_path / "strange.onnx")
        ended = cli("fold", tmp_path / "strange.onnx", "-o", tmp_path / "out.onnx", "--force")
        assert ended.code == (2 if folds else 0), ended.err
        assert ("cannot load" in ended.err) == folds


def test_external_data_are_read_by_one_thread_at_a_time(tmp_path: Path, cli: Any) -> None:
    """A verified fold runs the model from before in a thread; onnx-ir reads tensors of other files when they are first asked for."""
    net, x = Net(FREE, 4, 4, 4), "x"
    for _ in range(60):
        x = net.add("Tanh", net.bn(net.conv(x, 4, 4, 1), 4))
    file = tmp_path / "many.onnx"
    onnx.save(net.proto(x), file, save_as_external_data=True, location="many.bin", size_threshold=0)
    ended = cli("fold", file, "-o", tmp_path / "out.onnx")
    assert ended.code == 0, ended.err


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
    _, found = fold_and_check(net.model(net.add("Relu", two)))
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


def test_the_engine_does_not_import_torch() -> None:
    code = "import sys, bnctl.engines.onnx.engine; assert not {'torch', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_the_face_for_the_commands() -> None:
    net = Net(FREE, 4, 6, 6)
    net.add("Relu", net.bn(net.conv("x", 4, 4), 4), out="r")
    net.add("Conv", "r", net.normal(2, 4, 1, 1), out="y")
    model = Model("onnx", net.model("y"), "net.onnx")
    batches = [
        Batch((np.ones((2, 4, 6, 6), np.float32),), {}, None),
        Batch((np.zeros((1, 4, 6, 6), np.float32),), {}, None),
    ]
    engine = OnnxEngine()
    captured = engine.capture(model)
    folded = engine.fold(captured, plan_fold(captured.graph))
    assert count(folded.native, "BatchNormalization") == 0
    captured = engine.capture(folded)
    sites = [site for site in plan_insert(captured.graph) if site.obstacle is None]
    assert [site.name for site in sites] == ["n_v0"]
    again = engine.insert(captured, sites, engine.calibrate(captured, sites, batches), 1e-5)
    assert count(again.native, "BatchNormalization") == 1 and again.word == "net.onnx"
    assert worst_error(model.native, again.native)[0] < 2e-5


# Declared shapes


def _flattened(*, domain: str = "") -> Net:
    """A Reshape that moves the channels only if the convolution's output is not 1x1; `domain` hides what that output is."""
    net = Net(FREE, 3, "H", "W")
    v = net.add("Conv", "x", net.normal(4, 3, 6, 6), out="c")
    if domain:
        v = net.add("Mystery", v, out="m", domain=domain)
    net.bn(net.add("Reshape", v, np.array([-1, 4]), out="d"), 4, out="y")
    return net


def _declare(net: Net, **shapes: list[int | str]) -> ir.Model:
    proto = net.proto("y")
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    return ir.from_proto(proto)


def test_stale_declared_shapes_are_not_believed() -> None:
    model = _declare(_flattened(), c=[1, 4, 1, 1], d=[1, 4])
    folded, found = fold(model)
    assert list(found.values()) != [None]
    feeds = {"x": np.random.default_rng(0).normal(0, 1, (3, 3, 6, 9)).astype(np.float32)}
    before, after = run(model, feeds, inner=False), run(folded, feeds, inner=False)
    np.testing.assert_allclose(before["y"], after["y"], atol=1e-4)


def test_declared_shapes_help_behind_an_operator_that_inference_does_not_know() -> None:
    info = lift(_declare(_flattened(domain="mine"), m=["N", 4, 1, 1], d=["N", 4, 7])).info
    assert info["m"].shape == ("N", 4, 1, 1)
    assert info["d"].shape is not None and len(info["d"].shape) == 2, "it follows from what is declared before it"


# External data through the command line


def test_commands_on_a_model_with_external_data(tmp_path: Path) -> None:
    net = Net(FREE, 3, 8, 8)
    v = net.add("Relu", net.bn(net.conv("x", 3, 4), 4))
    net.add("Conv", v, net.normal(2, 4, 1, 1), out="y")
    model, folded, back = (str(tmp_path / name) for name in ("model.onnx", "folded.onnx", "back.onnx"))
    onnx.save(net.proto("y"), model, save_as_external_data=True, location="model.data", size_threshold=0)
    assert cli(["fold", model, "-o", folded]) == 0
    assert count(ir.load(folded), "BatchNormalization") == 0
    assert cli(["verify", model, folded]) == 0
    assert cli(["insert", folded, "-o", back, "--data", "random:16", "--input", "1x3x8x8"]) == 0
    assert count(ir.load(back), "BatchNormalization") == 1


def test_a_sparse_initializer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.conv("x", 4, 4), 4, out="y")
    proto = net.proto("y")
    dense = proto.graph.initializer[1]  # the bias of the convolution
    values = numpy_helper.to_array(dense)
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(values, dense.name), numpy_helper.from_array(np.arange(4, dtype=np.int64)), [4]
        )
    )
    proto.graph.initializer.remove(dense)
    path = tmp_path / "sparse.onnx"
    path.write_bytes(proto.SerializeToString())
    assert cli(["inspect", str(path)]) == 2
    shown = capsys.readouterr().err
    assert "is sparse" in shown and "dense tensor" in shown


def test_layers_that_nobody_reads() -> None:
    net = Net(FREE, 4, 6, 6)
    twice = net.conv("x", 4, 4)
    net.bn(net.bn(net.add("Add", twice, twice), 4, out="dead"), 4, out="deader")
    folded, found = fold_and_check(net.model(net.bn(net.conv("x", 4, 4), 4, out="y")))
    assert found["n_y"] is None and count(folded, "Conv") == 2


def test_an_output_without_a_shape_may_stay_so(tmp_path: Path) -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.conv("x", 4, 4), 4, out="y")
    proto = net.proto("y")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert cli(["fold", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "folded.onnx")]) == 0
    written = onnx.load(tmp_path / "folded.onnx")
    assert not written.graph.output[0].type.tensor_type.HasField("shape")


def test_inputs_that_a_model_does_not_take_are_tried_silently(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = Net(FREE, "C", "H", "W")
    net.bn(net.conv("x", 4, 4), 4, out="y")
    (tmp_path / "m.onnx").write_bytes(net.proto("y").SerializeToString())
    words = ["fold", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "folded.onnx"), "--input", "x:2x4x6x6", "--quiet"]
    assert cli(words) == 0
    assert capfd.readouterr() == ("", "")
