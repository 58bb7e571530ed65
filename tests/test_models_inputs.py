"""A bundle remembers what its inputs look like, so that later commands need no --input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch

from bnctl.cli.app import run
from bnctl.data.batches import Batch
from bnctl.data.synthetic import specs_of
from bnctl.engines.onnx.signature import input_specs
from bnctl.fixture import fixture_path


def test_specs_of_a_batch() -> None:
    batch = Batch((np.zeros((2, 3), np.float32),), {"mask": np.zeros((2, 4), np.int64)})
    assert [str(spec) for spec in specs_of(batch)] == ["2x3:float32", "mask:2x4:int64"]
    assert specs_of(Batch(([np.zeros(3)],))) == ()


def test_export_of_a_bundle_needs_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = f"bnctl.fixture:with_bn@{fixture_path('digits_bn.safetensors')}"
    assert run(["fold", word, "--input", "2x1x8x8", "-o", str(tmp_path / "b"), "--quiet"]) == 0
    assert run(["export", str(tmp_path / "b"), "-o", str(tmp_path / "m.onnx"), "--quiet"]) == 0
    assert run(["inspect", word]) == 2, "a factory does not say what its inputs look like"
    assert "--input" in capsys.readouterr().err


def test_bfloat16_inputs(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("half.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval().bfloat16()\n"
    )
    ended = cli("fold", "half:build", "--input", "2x3x8x8:bfloat16", "-o", "half.pt2", "--json")
    assert ended.code == 0, ended.err
    assert ended.document["verification"]["passed"]


def test_an_archive_knows_its_inputs_and_their_names(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    class Named(torch.nn.Module):
        def forward(self, image, factor):
            return net(image) * factor

    given = (torch.randn(2, 3, 8, 8), torch.randn(2, 4, 6, 6))
    torch.export.save(torch.export.export(Named().eval(), given), "named.pt2")
    assert cli("fold", "named.pt2", "-o", "folded.pt2").code == 0
    Path("images.py").write_text(
        "import numpy as np\ndef load():\n"
        "    yield {'factor': np.ones((2, 4, 6, 6), np.float32), 'image': np.ones((2, 3, 8, 8), np.float32)}\n"
    )
    ended = cli("fold", "named.pt2", "--data", "images:load", "-o", "again.pt2")
    assert ended.code == 0, ended.err


def test_axes_of_one_name_have_one_size():
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [], "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S", "N", 3, "L"]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 4, "L", None]),
        ],
        [],
    )  # fmt: skip
    specs = input_specs(onnx_ir.from_proto(helper.make_model(graph)), "m.onnx")
    assert [spec.shape for spec in specs] == [(2, 2, 3, 64), (2, 4, 64, 64)]
