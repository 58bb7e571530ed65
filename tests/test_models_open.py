from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from bnctl.errors import UntrustedError, UsageError
from bnctl.models import Origin, open_model
from bnctl.models.bundle import save_bundle
from bnctl.models.spec import parse_model_word

HERE = "test_models_open"


def build(width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_onnx(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    proto = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    model = open_model(str(path))
    assert model.kind == "onnx" and isinstance(model.native, onnx_ir.Model)
    assert model.sha256 == digest(path) and model.origin is None and model.word == str(path)


def test_pt2(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    module, x = build().eval(), torch.randn(4, 3)
    torch.export.save(torch.export.export(module, (x,)), path)
    model = open_model(str(path))
    assert model.kind == "torch" and isinstance(model.native, torch.fx.GraphModule)
    assert model.program is not None and model.sha256 == digest(path)
    assert torch.equal(model.native(x), module(x))


def test_a_factory_with_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    source = build(5)
    save_file(source.state_dict(), path)
    for model in (
        open_model(f"{HERE}:build", weights=path, model_args={"width": 5}),
        open_model(f"{HERE}:build@{path}", model_args={"width": 5}),
        open_model(parse_model_word(f"{HERE}:build", weights=path), model_args={"width": 5}),
    ):
        assert model.sha256 == digest(path)
        assert model.origin == Origin(f"{HERE}:build", {"width": 5}, weights=str(path))
        assert torch.equal(model.native.state_dict()["0.weight"], source[0].weight)


def test_a_factory_without_weights() -> None:
    model = open_model(f"{HERE}:build")
    assert model.sha256 is None and model.origin == Origin(f"{HERE}:build")


def test_a_bundle(tmp_path: Path) -> None:
    bundle, origin = tmp_path / "b", Origin(f"{HERE}:build", {"width": 5})
    save_bundle(bundle, build(5), origin)
    model = open_model(str(bundle))
    assert model.origin == origin and model.sha256 == digest(bundle / "bnctl.json")
    text = (bundle / "bnctl.json").read_text()
    (bundle / "bnctl.json").write_text(text + "\n")  # no longer the file that is on record
    with pytest.raises(UntrustedError):
        open_model(str(bundle))
    open_model(str(bundle), trust=True)
    open_model(str(bundle), trusted_factories=[f"{HERE}:*"])
    open_model(str(bundle), factory=build)


def test_a_factory_for_something_that_is_no_bundle() -> None:
    with pytest.raises(UsageError, match="not a bundle"):
        open_model(f"{HERE}:build", factory=build)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, bnctl.models, bnctl.models.bundle, bnctl.models.pt2, bnctl.models.onnx_file, bnctl.models.trust\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'scipy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_onnx_path_does_not_import_torch(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    proto = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    code = (
        "import sys\nfrom bnctl.models import open_model\nfrom bnctl.models.onnx_file import save_onnx\n"
        f"save_onnx(open_model({str(tmp_path / 'm.onnx')!r}).native, {str(tmp_path / 'o.onnx')!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
