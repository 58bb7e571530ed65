from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bnctl.errors import ModelError, UntrustedError
from bnctl.models.factory import build_module, load_weights
from bnctl.models.importing import current_folder_importable

HERE = "test_models_factory"


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def boom() -> nn.Module:
    raise ValueError("no such width")


def leave() -> nn.Module:
    sys.exit(0)


def number() -> int:
    return 3


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_factory_is_called_with_its_arguments() -> None:
    module = build_module(f"{HERE}:net", {"width": 5})
    assert isinstance(module, nn.Sequential)
    assert module[0].out_features == 5


def test_the_current_folder_is_importable_and_the_path_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bnctl_test_nets.py").write_text("from torch import nn\nbuild = nn.Identity\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(build_module("bnctl_test_nets:build"), nn.Identity)
    assert sys.path == before
    with pytest.raises(ZeroDivisionError), current_folder_importable():
        raise ZeroDivisionError
    assert sys.path == before


@pytest.mark.parametrize(
    ("factory", "args", "message", "hint"),
    [
        ("bnctl_no_such_module:net", {}, "no module named bnctl_no_such_module", "folder"),
        (f"{HERE}:nett", {}, "has no nett", "net"),
        (f"{HERE}:boom", {}, "ValueError: no such width", "--model-arg"),
        (f"{HERE}:leave", {}, "SystemExit", "--model-arg"),
        (f"{HERE}:number", {}, "returned a int", "returns the model"),
        (f"{HERE}:HERE", {}, "is a str", None),
        (f"{HERE}:net", {"wdth": 3}, "wdth=3", "--model-arg"),
    ],
)
def test_what_goes_wrong_is_named(factory: str, args: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build_module(factory, args)
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_an_import_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bnctl_test_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"bnctl_test_broken:x: importing .* ZeroDivisionError"):
        build_module("bnctl_test_broken:x")


def test_torchvision_builds_and_timm_too() -> None:
    module = build_module("torchvision.models:resnet18", {"num_classes": 3})
    assert module.fc.out_features == 3
    assert type(build_module("timm:create_model", {"model_name": "resnet10t"})).__module__ == "timm.models.resnet"


def test_another_runtime_error_on_import_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bnctl_test_runtime.py").write_text("raise RuntimeError('operator mine::nms does not exist')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="mine::nms"):
        build_module("bnctl_test_runtime:x")


@pytest.mark.parametrize("form", ["safetensors", "pt", "checkpoint"])
def test_weights_load_strictly(tmp_path: Path, form: str) -> None:
    source, target = net(), net()
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if form == "checkpoint" else state, path)
    load_weights(target, path)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), target.state_dict().values(), strict=True))


def test_a_misfit_names_what_is_missing_unexpected_and_misshapen(tmp_path: Path) -> None:
    state = net().state_dict()
    del state["1.weight"]
    state["extra"] = torch.ones(1)
    state["0.weight"] = torch.ones(4, 4)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as caught:
        load_weights(net(), tmp_path / "w.safetensors")
    assert "1 missing: 1.weight" in caught.value.message
    assert "1 unexpected: extra" in caught.value.message
    assert "0.weight (4x4, not 3x2)" in caught.value.message


def test_a_data_parallel_prefix_is_recognised(tmp_path: Path) -> None:
    save_file({f"module.{k}": v for k, v in net().state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as caught:
        load_weights(net(), tmp_path / "w.safetensors")
    assert "module." in (caught.value.hint or "")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save(Evil(f"touch {marker}"), tmp_path / "w.pt")
    with pytest.raises(UntrustedError, match="needs code"):
        load_weights(net(), tmp_path / "w.pt")
    assert not marker.exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # the attack is real
    assert marker.exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = net().state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError, match=name):
        load_weights(net(), path)


def test_something_else_than_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="no state dict"):
        load_weights(net(), tmp_path / "w.pt")


def test_the_operators_are_declared_only_when_they_are_missing() -> None:
    code = (
        "import torch\n"
        "from bnctl.models import importing\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "[library.define(s) for s in importing._TORCHVISION_SCHEMAS]\n"
        "importing.import_module('torchvision')\n"
        "assert not importing._libraries\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
