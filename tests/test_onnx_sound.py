"""ONNX files that are not in order, or hold what would be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from test_onnx_checks import FREE, Net


def conv_and_norm(**training: Any) -> Net:
    net = Net(FREE, 3, 8, 8, opset=15)
    v = net.conv("x", 3, 4)
    net.add("BatchNormalization", v, *net.statistics(4), out="y", outputs=3 if training else 1, **training)
    return net


def written(path: Path, net: Net, *outputs: str) -> Path:
    onnx.save(net.proto(*(outputs or ("y",))), path)
    return path


def test_nodes_in_no_order_are_sorted(cli, tmp_path: Path) -> None:
    net = conv_and_norm()
    proto = net.proto("y")
    proto.graph.node.reverse()
    onnx.save(proto, tmp_path / "m.onnx")
    ended = cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx", "--json")
    assert (ended.code, ended.document["summary"]["folded"]) == (0, 1)
    onnx.checker.check_model(onnx.load(tmp_path / "f.onnx"), full_check=True)


def test_bodies_in_no_order_are_sorted(cli, tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Abs", ["y"], ["a"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    net = conv_and_norm()
    net.nodes.append(helper.make_node("If", [net.param(np.array(True))], ["z"], then_branch=branch, else_branch=branch))
    proto = net.proto("y")
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, 4, 6, 6]))
    proto.graph.node.insert(0, proto.graph.node.pop())  # reads "y" in its bodies alone
    onnx.save(proto, tmp_path / "m.onnx")
    assert cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx").code == 0


def broken(kind: str) -> onnx.ModelProto:
    net = conv_and_norm()
    conv, norm = net.nodes
    match kind:
        case "missing":
            conv.input[0] = "nope"
        case "circle":
            conv.input[0] = "y"
        case "short":
            del norm.input[2:]
        case "long":
            norm.input.append("x")
        case "shapes":
            norm.input[4] = conv.input[1]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in net.initializers.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(net.nodes, "net", net.inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


@pytest.mark.parametrize("command", ["inspect", "fold", "recalibrate"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "reads nope, which nobody computes"),
        ("circle", "form a circle"),
        ("short", "has 2 inputs, and takes 5"),
        ("long", "has 6 inputs, and takes 5"),
        ("shapes", "parameters of different shapes"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused(cli, tmp_path: Path, command: str, kind: str, words: str) -> None:
    onnx.save(broken(kind), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 3, 8, 8), np.float32))
    more = {"inspect": [], "fold": ["-o", tmp_path / "f.onnx"]}.get(
        command, ["-o", tmp_path / "f.onnx", "--data", tmp_path / "d.npz"]
    )
    ended = cli(command, tmp_path / "m.onnx", *more)
    assert ended.code == 2
    assert words in " ".join(ended.err.split())


def test_what_is_said_of_training_is_not_dropped_without_a_word(cli, tmp_path: Path) -> None:
    proto = conv_and_norm().proto("y")
    proto.training_info.add().algorithm.name = "steps"
    onnx.save(proto, tmp_path / "m.onnx")
    ended = cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx")
    assert ended.code == 2 and "training_info" in ended.err


@pytest.mark.parametrize("outputs", [("y",), ("y", "y_1")])
def test_a_norm_in_training_is_a_finding_whoever_reads_its_statistics(
    cli, tmp_path: Path, outputs: tuple[str, ...]
) -> None:
    path = written(tmp_path / "m.onnx", conv_and_norm(training_mode=1), *outputs)
    ended = cli("check", path, "--json")
    assert ended.code == 1
    assert [site["code"] for site in ended.document["sites"]] == ["BN105"]


def test_what_is_said_of_outputs_and_weights_stays(cli, tmp_path: Path) -> None:
    proto = conv_and_norm().proto("y")
    output, weight = proto.graph.output[0], proto.graph.initializer[0]
    output.doc_string, weight.doc_string = "of the output", "of the weight"
    output.metadata_props.add(key="k", value="v")
    annotation = proto.graph.quantization_annotation.add(tensor_name=proto.graph.node[0].output[0])
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=proto.graph.initializer[2].name)
    onnx.save(proto, tmp_path / "m.onnx")
    assert cli("fold", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx").code == 0
    folded = onnx.load(tmp_path / "f.onnx").graph
    assert folded.output[0].doc_string == "of the output"
    assert [(p.key, p.value) for p in folded.output[0].metadata_props] == [("k", "v")]
    assert folded.initializer[0].doc_string == "of the weight"
    assert not folded.quantization_annotation  # it was of the value before the fold
