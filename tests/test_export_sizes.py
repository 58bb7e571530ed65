"""Export fixes the sizes that it was not asked to leave open; the model that was given may take others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""


@pytest.mark.parametrize("how", [("--keep-bn",), (), ("--static-batch",), ("--static-batch", "--keep-bn")])
def test_a_model_that_takes_any_size(how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    (tmp_path / "any_size_net.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = cli("export", "any_size_net:build", "-o", "out.onnx", "--input", "2x3x12x12", "--json", *how)
    assert ended.code == 0, ended.err
    assert ended.document["verification"]["passed"]
    sizes = onnx.load("out.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in sizes][1:] == [3, 12, 12]
    assert bool(sizes[0].dim_value) == ("--static-batch" in how)
