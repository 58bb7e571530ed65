"""Large weights: written without a second copy, and external ones never held twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bnctl.models.onnx_file import load_onnx, save_onnx
from bnctl.models.onnx_stream import write_inline
from test_onnx_checks import FREE, Net

# Written tensor by tensor


def _tensors() -> list[ir.Tensor | ir.StringTensor]:
    rng = np.random.default_rng(0)
    dtypes: list[Any] = [np.float32, np.float64, np.float16, np.int8, np.int64, np.uint16, ml_dtypes.bfloat16]
    arrays = [rng.normal(0, 50, (3, 1000)).astype(dtype) for dtype in dtypes]
    arrays += [rng.normal(0, 1, (5000,)) > 0, np.float32(3), np.zeros((0, 4), np.float32), np.ones(3, np.float32)]
    found: list[ir.Tensor | ir.StringTensor] = [ir.Tensor(np.asarray(a)) for a in arrays]
    found.append(ir.Tensor(rng.integers(-8, 8, 3001).astype(ml_dtypes.int4), dtype=ir.DataType.INT4))
    found.append(ir.Tensor(np.arange(6000, dtype=np.float32).reshape(60, 100).T))  # not contiguous
    found.append(ir.StringTensor([b"word"] * 500, shape=ir.Shape([500])))
    return found


def _model(*, described: bool = True) -> ir.Model:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.conv("x", 4, 64), 64, out="y")
    model = net.model("y")
    for number, tensor in enumerate(_tensors()):
        tensor.name, tensor.doc_string = f"t{number}", f"number {number}"
        if described:  # (onnx-ir writes those of a tensor that it read twice)
            tensor.metadata_props["of"] = "test"
        model.graph.register_initializer(ir.Value(name=tensor.name, const_value=tensor))
    model.metadata_props["who"] = "me"
    return model


def _differences(path: Path, model: ir.Model) -> list[str]:
    """Fields in which a file differs from what onnx-ir makes of the model."""
    read, wanted = onnx.load(path), ir.to_proto(model)
    found = [t.name for t, w in zip(read.graph.initializer, wanted.graph.initializer, strict=True) if t != w]
    return found + ([] if read == wanted else ["the rest"])


def test_the_file_says_what_the_message_says(tmp_path: Path) -> None:
    model = _model()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    write_inline(model, tmp_path / "m.onnx")
    assert _differences(tmp_path / "m.onnx", model) == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    onnx.checker.check_model(str(tmp_path / "m.onnx"))


def test_tensors_that_come_from_a_file(tmp_path: Path) -> None:
    model = _model(described=False)
    ir.save(model, tmp_path / "m.onnx")
    again = ir.load(tmp_path / "m.onnx")
    write_inline(again, tmp_path / "n.onnx")
    assert _differences(tmp_path / "n.onnx", again) == []


def test_the_comparison_of_files_notices_a_byte(tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "m.onnx"
    write_inline(model, path)
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    assert _differences(path, model) != []


def test_saving_and_loading(tmp_path: Path) -> None:
    model = _model(described=False)
    save_onnx(model, tmp_path / "m.onnx")
    again = load_onnx(tmp_path / "m.onnx")
    assert ir.to_proto(again).graph.initializer == ir.to_proto(model).graph.initializer


# External weights

_MEASURE = """
import json, resource, sys
from bnctl.cli.app import run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = run(sys.argv[1:])
print(json.dumps([code, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def _with_table(folder: Path, rows: int) -> Path:
    """conv and BatchNorm beside a large table of external floats, 1 KiB a row."""
    net = Net(FREE, 3, 8, 8)
    v = net.add("Relu", net.bn(net.conv("x", 3, 256), 256))
    v = net.add("Flatten", net.add("GlobalAveragePool", v))
    net.inputs.append(helper.make_tensor_value_info("rows", TensorProto.INT64, [FREE]))
    table = np.zeros((2, 256), np.float32)
    net.add("Mul", v, net.add("Gather", net.param(table, "table"), "rows"), out="y")
    proto = net.proto("y")
    tensor = next(t for t in proto.graph.initializer if t.name == "table")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.dims[0] = rows
    for key, value in (("location", "table.bin"), ("offset", "0"), ("length", str(rows << 10))):
        tensor.external_data.add(key=key, value=value)
    with (folder / "table.bin").open("wb") as file:
        block: NDArray[np.float32] = np.random.default_rng(0).normal(0, 1, (1024, 256)).astype(np.float32)
        for _ in range(rows // 1024):
            file.write(block.tobytes())
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of the measured memory is that of Linux")
def test_external_weights_are_not_held_in_memory(tmp_path: Path) -> None:
    """96 MiB that nothing is folded into: what folding takes above an almost empty model stays below one copy of them."""
    peaks = {}
    for rows in (1024, 96 << 10):
        folder = tmp_path / str(rows)
        folder.mkdir()
        model, out = _with_table(folder, rows), folder / "out.onnx"
        words = ["fold", str(model), "-o", str(out), "--no-verify", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, *words],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        code, before, peak = json.loads(done.stdout.splitlines()[-1])
        assert code == 0 and peak >= before
        assert (folder / "out.onnx.data").stat().st_size >= rows << 10
        peaks[rows] = peak
    assert peaks[96 << 10] - peaks[1024] < 72 << 10, peaks
