from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnctl.errors import ModelError, UsageError
from bnctl.models import onnx_file
from bnctl.models.onnx_file import check_external_data, load_onnx, save_onnx

W = np.arange(300, dtype=np.float32).reshape(3, 100)


def external(name: str = "w", **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=W.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(
    *tensors: TensorProto, nodes: list[onnx.NodeProto] | None = None, functions: list[onnx.FunctionProto] | None = None
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 100])
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], initializer=list(tensors)
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions or [], ir_version=8)


def store(folder: Path, proto: onnx.ModelProto) -> Path:
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "model"
    inner.mkdir()
    (inner / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    return inner


def test_external_data_in_the_folder_is_mapped_not_read(folder: Path) -> None:
    loaded = load_onnx(store(folder, model(external(offset="0", length="1200"))))
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert tensor.raw is None
    np.testing.assert_array_equal(tensor.numpy(), W)


def test_a_relative_path_in_the_current_folder_keeps_onnx_irs_own_checks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(folder, model(external()))
    monkeypatch.chdir(folder)
    tensor = load_onnx("m.onnx").graph.initializers["w"].const_value
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert os.fspath(tensor.base_dir) == str(folder)


def in_attribute(tensor: TensorProto) -> onnx.ModelProto:
    return model(
        nodes=[helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("MatMul", ["x", "w"], ["y"])]
    )


def in_subgraph(tensor: TensorProto) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["o"])], "b", [], [out], initializer=[tensor])
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    return model(nodes=[condition, helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)])


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("mine", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
    return model(nodes=[helper.make_node("F", ["x"], ["y"], domain="mine")], functions=[function])


def in_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return model(tensor)


PLACES = [in_initializer, in_attribute, in_subgraph, in_function]


@pytest.mark.parametrize("place", PLACES)
def test_an_escape_is_found_wherever_the_tensor_is(
    folder: Path, place: Callable[[TensorProto], onnx.ModelProto]
) -> None:
    path = store(folder, place(external(location="../secret.bin")))
    with pytest.raises(ModelError, match=r"tensor w: .*outside the model's folder"):
        check_external_data(path)
    with pytest.raises(ModelError):
        load_onnx(path)
    check_external_data(store(folder, place(external())))  # the same model with its data at home is fine


@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_was_written_again_computes_the_same(
    folder: Path, tmp_path: Path, place: Callable[[TensorProto], onnx.ModelProto]
) -> None:
    import onnxruntime as ort

    x = np.ones((2, 3), np.float32)
    target = tmp_path / "out.onnx"
    save_onnx(load_onnx(store(folder, place(external()))), target)
    (folder / "w.bin").unlink()  # nothing of the source is needed any more
    (y,) = ort.InferenceSession(target, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ W)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "/etc/hostname"}, "outside"),
        ({"location": "C:\\secret"}, "outside"),
        ({"location": "sub/../../secret.bin"}, "outside"),
        ({"location": ""}, "names no file"),
        ({"location": "gone.bin"}, "cannot be read"),
        ({"location": "."}, "not a regular file"),
        ({"offset": "4"}, "ends at byte 1204"),
        ({"offset": "-4"}, "not a number of bytes"),
        ({"offset": "1e3"}, "not a number of bytes"),
        ({"length": "1196"}, "need 1200"),
        ({"length": "9999999999999999999999"}, "not a number of bytes"),
    ],
)
def test_where_external_data_may_not_be(folder: Path, entries: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_external_data(store(folder, model(external(**entries))))


def test_links_that_leave_the_folder_are_refused(folder: Path) -> None:
    path = store(folder, model(external(location="l.bin")))
    (folder / "l.bin").symlink_to("w.bin")
    check_external_data(path)
    (folder / "l.bin").unlink()
    (folder / "l.bin").symlink_to(folder.parent / "secret.bin")
    with pytest.raises(ModelError, match="is a link to"):
        check_external_data(path)
    (folder / "l.bin").unlink()
    (folder / "l.bin").hardlink_to(folder.parent / "secret.bin")
    with pytest.raises(ModelError, match="2 hard links"):
        check_external_data(path)


def test_a_pipe_is_refused_without_waiting(folder: Path) -> None:
    os.mkfifo(folder / "p.bin")
    with pytest.raises(ModelError, match="not a regular file"):
        check_external_data(store(folder, model(external(location="p.bin"))))


def test_odd_tensors_are_refused(folder: Path) -> None:
    twice = external()
    twice.external_data.add(key="location", value="../secret.bin")
    strings = external()
    strings.data_type = TensorProto.STRING
    negative = external()
    negative.dims[0] = -3
    for tensor, message in ((twice, "twice"), (strings, "cannot be external"), (negative, "cannot be external")):
        with pytest.raises(ModelError, match=message):
            check_external_data(store(folder, model(tensor)))


@pytest.mark.parametrize("content", [b"", b"hello, this is not ONNX", b"\x00" * 100, "cut"])
def test_what_is_not_onnx_is_named(folder: Path, content: bytes | str) -> None:
    whole = model(numpy_helper.from_array(W, "w")).SerializeToString()
    (folder / "m.onnx").write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=r"m\.onnx"):
        load_onnx(folder / "m.onnx")


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    save_onnx(load_onnx(store(tmp_path, model(numpy_helper.from_array(W, "w")))), tmp_path / "out.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "out.onnx"}
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_external_data_stay_external_and_both_files_are_guarded(folder: Path) -> None:
    source = load_onnx(store(folder, model(external())))
    save_onnx(source, folder / "out.onnx")
    assert {p.name for p in folder.iterdir()} == {"m.onnx", "w.bin", "out.onnx", "out.onnx.data"}
    onnx.checker.check_model(folder / "out.onnx", full_check=True)
    (folder / "out.onnx").unlink()
    with pytest.raises(UsageError, match=r"out\.onnx\.data exists already"):
        save_onnx(source, folder / "out.onnx")


def test_a_model_can_replace_its_own_source(folder: Path) -> None:
    save_onnx(load_onnx(store(folder, model(external()))), folder / "a.onnx")
    again = load_onnx(folder / "a.onnx")
    save_onnx(again, folder / "a.onnx", force=True)
    tensor = load_onnx(folder / "a.onnx").graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), W)


def test_a_large_model_moves_its_tensors_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_LARGEST_INLINE_BYTES", 1000)
    save_onnx(load_onnx(store(tmp_path, model(numpy_helper.from_array(W, "w")))), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == W.nbytes


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_onnx(store(tmp_path, model(numpy_helper.from_array(W, "w"))))
    (tmp_path / "out.onnx").write_text("old")

    def fail(model: object, path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(onnx_file, "write_inline", fail)
    with pytest.raises(ModelError, match="disk full"):
        save_onnx(source, tmp_path / "out.onnx", force=True)
    assert (tmp_path / "out.onnx").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "out.onnx"}
