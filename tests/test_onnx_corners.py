"""Valid ONNX files that are rare: what they hold, where their weights lie, and what is said of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnctl
from test_onnx_checks import FREE, Net
from test_onnx_sound import conv_and_norm, written


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def external(path: Path, data: str) -> Path:
    """A model with all its weights in another file; those of a layer that no surgery changes among them."""
    net = conv_and_norm()
    net.add("Relu", net.conv("y", 4, 64), out="z")
    onnx.save_model(net.proto("z"), path, save_as_external_data=True, location=data, size_threshold=0)
    return path


class TestDataFiles:
    """A file with weights is replaced together with the model that it belongs to, or not at all."""

    def test_those_of_the_source_are_kept(self, cli: Any, tmp_path: Path) -> None:
        source = external(tmp_path / "original.onnx", "model.onnx.data")
        before = digest(tmp_path / "model.onnx.data")
        for force in ((), ("--force",)):
            result = cli("fold", source, "-o", tmp_path / "model.onnx", *force)
            assert result.code == 2
            assert "model.onnx.data holds the weights of original.onnx" in result.err
        assert digest(tmp_path / "model.onnx.data") == before
        assert not (tmp_path / "model.onnx").exists()

    def test_those_of_another_model_are_kept(self, cli: Any, tmp_path: Path) -> None:
        source = external(tmp_path / "source.onnx", "source.onnx.data")
        external(tmp_path / "renamed.onnx", "model.onnx.data")
        before = digest(tmp_path / "model.onnx.data")
        result = cli("fold", source, "-o", tmp_path / "model.onnx", "--force")
        assert result.code == 2
        assert "is not the data file of" in result.err
        written(tmp_path / "model.onnx", conv_and_norm())  # a model of that name, which has its weights inside
        assert cli("fold", source, "-o", tmp_path / "model.onnx", "--force").code == 2
        assert digest(tmp_path / "model.onnx.data") == before

    def test_in_place_does_not_mean_any_file_beside_it(self, cli: Any, tmp_path: Path) -> None:
        source = external(tmp_path / "model.onnx", "weights.bin")
        external(tmp_path / "renamed.onnx", "model.onnx.data")
        before = digest(tmp_path / "model.onnx.data")
        result = cli("fold", source, "-o", source, "--force")
        assert result.code == 2
        assert "is not the data file of" in result.err
        assert digest(tmp_path / "model.onnx.data") == before

    def test_its_own_are_replaced(self, cli: Any, tmp_path: Path) -> None:
        source = external(tmp_path / "source.onnx", "source.onnx.data")
        external(tmp_path / "model.onnx", "model.onnx.data")
        assert cli("fold", source, "-o", tmp_path / "model.onnx").code == 2
        assert cli("fold", source, "-o", tmp_path / "model.onnx", "--force").code == 0
        assert cli("verify", source, tmp_path / "model.onnx").code == 0
        assert cli("fold", source, "-o", source, "--force").code == 0  # in place
        assert cli("verify", source, tmp_path / "model.onnx").code == 0


def with_odd_input(kind: onnx.TypeProto, output: onnx.TypeProto) -> onnx.ModelProto:
    """A convolution and its norm, and a value of some kind that passes by."""
    proto = conv_and_norm().proto("y")
    proto.graph.node.append(helper.make_node("Identity", ["odd"], ["odd_out"]))
    proto.graph.input.append(helper.make_value_info("odd", kind))
    proto.graph.output.append(helper.make_value_info("odd_out", output))
    return proto


STRINGS = helper.make_tensor_type_proto(TensorProto.STRING, [2])
SEQUENCE = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))


@pytest.mark.parametrize(("kind", "held"), [(STRINGS, "strings"), (SEQUENCE, "no tensor but SequenceType")])
def test_inputs_that_cannot_be_made_up_are_needed_for_running_only(
    cli: Any, tmp_path: Path, kind: onnx.TypeProto, held: str
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(with_odd_input(kind, kind), path)
    assert cli("inspect", path).code == 0
    assert cli("check", path).code == 1
    assert cli("fold", path, "--dry-run").code == 0
    refused = cli("fold", path, "-o", tmp_path / "o.onnx")
    assert refused.code == 2
    assert f"m.onnx: input odd holds {held}" in refused.err
    assert "--no-verify" in refused.err
    assert cli("fold", path, "-o", tmp_path / "o.onnx", "--no-verify").code == 0
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["Conv", "Identity"]


def test_maps_are_named(cli: Any, tmp_path: Path) -> None:
    proto = conv_and_norm().proto("y")
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    proto.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(kind)))
    onnx.save(proto, tmp_path / "m.onnx")
    result = cli("inspect", tmp_path / "m.onnx")
    assert result.code == 2
    assert "m.onnx has values of map type" in result.err
    assert "zipmap" in result.err


def test_a_model_without_inputs(cli: Any, tmp_path: Path) -> None:
    net = Net(FREE, 3, 8, 8)
    v = net.conv(net.param(net.normal(2, 3, 8, 8)), 3, 4)
    net.add("Relu", net.bn(v, 4), out="y")
    net.inputs = []
    written(tmp_path / "m.onnx", net)
    for command in ("inspect", "check"):
        assert cli(command, tmp_path / "m.onnx").code in {0, 1}
    result = cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx")
    assert result.code == 0, result.err


def test_random_numbers_are_blamed_on_themselves(cli: Any, tmp_path: Path) -> None:
    net = conv_and_norm()
    net.add("RandomNormalLike", "y", out="r")
    net.add("Add", "y", "r", out="z")
    written(tmp_path / "m.onnx", net, "z")
    result = cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx")
    assert result.code == 2
    assert "m.onnx draws random numbers (RandomNormalLike n_r)" in result.err
    assert "--skip" not in result.err
    assert cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--no-verify").code == 0


def test_an_overflow_names_what_can_be_left_out(cli: Any, tmp_path: Path) -> None:
    net = Net(FREE, 3, 8, 8, dtype=np.float16)
    v = net.add("Relu", net.bn(net.conv("x", 3, 4), 4))
    w = net.conv(v, 4, 4)
    large = [np.full(4, n) for n in (6e4, 0.0, 0.0, 1e-6)]
    net.add("BatchNormalization", w, *large, out="y")
    written(tmp_path / "m.onnx", net)
    result = cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx")
    assert result.code == 2
    assert f"m.onnx: n_y cannot be folded into n_{w}" in result.err
    assert "--skip 'n_y'" in result.err
    again = cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--skip", "n_y", "--json")
    assert again.code == 0
    assert again.document["summary"] == {"found": 2, "folded": 1, "left": 1}


def tied() -> onnx.ModelProto:
    """A table that is read by rows, and multiplied with as a matrix: transposed."""
    net = Net("N", 5)
    net.inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 5])]
    net.param(net.normal(4, 4), "table")
    rows = net.add("Mul", net.add("Gather", "table", "ids"), net.normal(4))
    net.add("Mul", net.add("MatMul", rows, net.add("Transpose", "table", perm=[1, 0])), net.normal(4), out="y")
    return net.proto("y")


def stored(path: Path) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer)


def test_a_tie_through_a_transpose_is_a_tie(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(tied(), path)
    result = cli("fold", path, "-o", tmp_path / "o.onnx", "--json")
    assert result.code == 0
    assert result.document["summary"]["folded"] == 2
    assert stored(tmp_path / "o.onnx") - stored(path) + 8 == 16 == result.document["summary"]["added_parameters"]
    left = cli("fold", path, "-o", tmp_path / "l.onnx", "--no-untie", "--json")
    assert left.code == 0
    assert left.document["summary"]["folded"] == 0
    assert stored(tmp_path / "l.onnx") == stored(path)


def test_what_the_checker_refuses_already_is_said_of_the_source(cli: Any, tmp_path: Path) -> None:
    """GroupNormalization of opset 18 is deprecated; runtimes run it."""
    net = Net(FREE, 4, 8, 8, opset=18)
    v = net.bn(net.conv("x", 4, 4), 4)
    net.add("GroupNormalization", v, np.ones(2), np.zeros(2), num_groups=2, out="y")
    proto = net.proto()
    proto.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 6, 6]))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(str(tmp_path / "m.onnx"))
    result = cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx")
    assert result.code == 2
    assert "m.onnx is not valid ONNX, and the result would not be" in result.err
    assert not (tmp_path / "o.onnx").exists()


def test_metadata_are_written_once(cli: Any, tmp_path: Path) -> None:
    proto = conv_and_norm().proto("y")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1000, np.float32), "unused"))
    for tensor in proto.graph.initializer:
        entry = tensor.metadata_props.add()
        entry.key, entry.value = "made", "by hand"
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    for _ in range(3):
        assert cli("fold", path, "-o", path, "--force").code == 0
        kept = [[(p.key, p.value) for p in t.metadata_props] for t in onnx.load(path).graph.initializer]
        assert kept
        assert all(entries in ([("made", "by hand")], []) for entries in kept)
        assert any(kept)


def test_one_axis_has_no_channels(cli: Any, tmp_path: Path) -> None:
    net = Net(FREE)
    net.bn("x", 1, out="y")
    written(tmp_path / "m.onnx", net)
    left = cli("inspect", tmp_path / "m.onnx", "--json").document["sites"]
    assert [(s["code"], s["reason"]) for s in left] == [("BN116", "x has one axis, and no channels")]
    x = np.random.default_rng(0).normal(3, 2, 64).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    result = cli("recalibrate", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--data", tmp_path / "d.npz")
    assert result.code == 0, result.err
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert np.isclose(list(arrays.values())[2], x.mean(), rtol=1e-5)


def test_no_channels_at_all(cli: Any, tmp_path: Path) -> None:
    net = Net(FREE, 3)
    net.bn(net.add("Gemm", "x", net.param(np.zeros((3, 0)))), 0, out="y")
    written(tmp_path / "m.onnx", net)
    assert cli("inspect", tmp_path / "m.onnx").code == 0
    assert cli("check", tmp_path / "m.onnx").code in {0, 1}


def test_an_input_called_x_beside_others(cli: Any, tmp_path: Path) -> None:
    net = conv_and_norm()
    net.inputs.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [FREE, 4, 1, 1]))
    net.add("Mul", "y", "t", out="z")
    written(tmp_path / "m.onnx", net, "z")
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(8, 3, 8, 8)), "t": rng.normal(size=(8, 4, 1, 1))}
    np.savez(tmp_path / "d.npz", **{k: v.astype(np.float32) for k, v in arrays.items()})
    for command in ("fold", "recalibrate", "insert"):
        out = tmp_path / f"{command}.onnx"
        result = cli(command, tmp_path / "m.onnx", "-o", out, "--data", tmp_path / "d.npz")
        assert result.code == 0, result.err


def test_what_the_runtime_lacks_is_not_blamed_on_the_data(cli: Any, tmp_path: Path) -> None:
    net = Net(FREE, 3, 8, 8, dtype=np.float64)
    net.bn(net.conv("x", 3, 4), 4, out="y")
    written(tmp_path / "m.onnx", net)
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 3, 8, 8)))
    result = cli("recalibrate", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--data", tmp_path / "d.npz")
    assert result.code == 2
    assert "ONNX Runtime cannot load" in result.err
    assert "does not run through" not in result.err
    model = onnx.load(tmp_path / "m.onnx")
    folded = bnctl.fold(model, verify=False).model
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8))
    before, after = (onnx.reference.ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (model, folded))
    assert np.abs(before - after).max() < 1e-12
    assert [n.op_type for n in folded.graph.node] == ["Conv"]


def test_the_reference_would_see_a_lost_norm() -> None:
    """The control of the last test."""
    net = Net(FREE, 3, 8, 8, dtype=np.float64)
    v = net.conv("x", 3, 4)
    net.bn(v, 4, out="y")
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8))
    evaluator = onnx.reference.ReferenceEvaluator(net.proto("y", v))
    before, without = evaluator.run(None, {"x": x})
    assert np.abs(before - without).max() > 0.1
