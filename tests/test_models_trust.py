from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bnctl.errors import UntrustedError
from bnctl.models.importing import import_module
from bnctl.models.trust import check_factory
from bnctl.models.written import record_path, record_written, was_written_here

HERE = "test_models_trust"


class Net(nn.Module):
    """A class of a module that somebody imported."""


def build() -> nn.Module:
    return Net()


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("factory", "args"),
    [
        ("torchvision.models:resnet18", {}),
        ("torchvision.models:resnet18", {"weights": None, "num_classes": 3}),
        ("torchvision.models.resnet:resnet18", {}),
        ("torchvision.models.detection:fcos_resnet50_fpn", {"weights_backbone": None}),
        ("torchvision.models:ResNet", {}),
        ("timm.models:resnet18", {"pretrained": False}),
        ("timm:create_model", {"model_name": "resnet10t.c3_in1k"}),
        ("timm.models:create_model", {"model_name": "resnet18", "pretrained": False}),
        ("timm.models.vision_transformer:VisionTransformer", {"depth": 1}),
        ("torch.nn:Linear", {"in_features": 2, "out_features": 2}),
        (f"{HERE}:Net", {}),
    ],
)
def test_known_architectures_and_imported_module_classes_may_be_called(factory: str, args: dict[str, Any]) -> None:
    check_factory(factory, args)


@pytest.mark.parametrize(
    ("factory", "args"),
    [
        ("os:system", {"command": "true"}),
        ("posix:system", {"command": "true"}),
        ("subprocess:run", {"args": "true"}),
        ("builtins:exec", {}),
        ("builtins:eval", {}),
        ("torch:load", {"f": "x.pt", "weights_only": False}),
        ("torch.hub:load", {"repo_or_dir": "a/b", "model": "c"}),
        ("torch.nn:os.system", {}),
        ("torch.utils.data:DataLoader", {}),
        ("torch.nn.modules.module:torch.load", {}),
        ("torch.fx:GraphModule", {}),
        ("torch.distributed.nn:RemoteModule", {}),
        ("torchvision.models:os.system", {}),
        ("torchvision.models:_api.os", {}),
        ("torchvision.models._api:importlib", {}),
        ("torchvision.models._api:load_state_dict_from_url", {"url": "x"}),
        ("torchvision.models:get_model", {"name": "resnet18", "weights": "DEFAULT"}),
        ("torchvision.models:nothing", {}),
        ("torchvision.models.nothing:resnet18", {}),
        ("torchvision.modelsx:resnet18", {}),
        ("torchvision.io:read_file", {"path": "x"}),
        ("torchvision.datasets:CIFAR10", {"root": "x", "download": True}),
        ("timm.models:load_checkpoint", {}),
        ("timm.models._hub:push_to_hf_hub", {}),
        ("timm.models._hub:download_cached_file", {"url": "x"}),
        ("timm.utils:random_seed", {}),
        (f"{HERE}:build", {}),
        (f"{HERE}:import_module", {"name": "antigravity"}),
        (f"{HERE}:nn.Linear", {}),
        ("__main__:Net", {}),
        ("", {}),
        (":", {}),
        ("os", {}),
        ("os.path:..os.system", {}),
        ("torchvision.models: resnet18", {}),
        ("torchvision.models:resnet18\n", {}),
    ],
)
def test_everything_else_is_refused(factory: str, args: dict[str, Any]) -> None:
    with pytest.raises(UntrustedError) as caught:
        check_factory(factory, args)
    assert "--trust" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("factory", "args"),
    [
        ("torchvision.models:resnet18", {"weights": "DEFAULT"}),
        ("torchvision.models:resnet18", {"pretrained": True}),
        ("torchvision.models.detection:fcos_resnet50_fpn", {}),  # its default fetches a backbone
        ("timm.models:resnet18", {"pretrained": True}),
        ("timm:create_model", {"model_name": "resnet18", "pretrained": True}),
        ("timm:create_model", {"model_name": "resnet18", "pretrained_cfg": {"url": "x"}}),
        ("timm:create_model", {"model_name": "resnet18", "checkpoint_path": "x.pth"}),
        ("timm:create_model", {"model_name": "hf-hub:someone/something"}),
        ("timm:create_model", {"model_name": "hf_hub:someone/something"}),
        ("timm:create_model", {"model_name": "local-dir:/tmp/x"}),
        ("timm:create_model", {"model_name": "nothing"}),
        ("timm:create_model", {}),
    ],
)
def test_arguments_that_fetch_something_are_refused(factory: str, args: dict[str, Any]) -> None:
    with pytest.raises(UntrustedError, match=r"download|architecture|another file"):
        check_factory(factory, args)


def test_the_check_imports_nothing_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bnctl_test_evil.py").write_text(
        "from pathlib import Path\nPath('marker').touch()\nfrom torch import nn\nclass Net(nn.Module): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UntrustedError):
        check_factory("bnctl_test_evil:Net", {})
    assert not (tmp_path / "marker").exists()
    import_module("bnctl_test_evil")
    assert (tmp_path / "marker").exists()  # importing it would have run it
    check_factory("bnctl_test_evil:Net", {})  # and now that somebody did, the class may be built


def test_a_folder_that_calls_itself_timm_is_not_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("from pathlib import Path\nPath('marker').touch()\n")
    for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UntrustedError, match="not from the installed timm"):
        check_factory("timm.models:resnet18", {})
    assert not (tmp_path / "marker").exists()


def test_patterns_of_the_user() -> None:
    with pytest.raises(UntrustedError):
        check_factory("my_nets.small:build", {}, trusted_factories=["my_nets:*", "other.*:build"])
    check_factory("my_nets.small:build", {}, trusted_factories=["my_nets.*:build"])


def test_the_record_of_what_was_written_here(state: Path) -> None:
    assert not was_written_here("ab", f"{HERE}:build")
    assert record_written("ab", f"{HERE}:build")
    assert was_written_here("ab", f"{HERE}:build")
    assert not was_written_here("cd", f"{HERE}:build")
    assert not was_written_here("ab", "os:system")  # other code than was recorded
    assert record_path().is_relative_to(state)


def test_the_record_counts_only_where_the_factory_is_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bnctl_test_nets2.py").write_text("")
    monkeypatch.chdir(tmp_path / "mine")
    assert record_written("ab", "bnctl_test_nets2:build")
    assert was_written_here("ab", "bnctl_test_nets2:build")
    monkeypatch.chdir(tmp_path / "theirs")
    assert not was_written_here("ab", "bnctl_test_nets2:build")


@pytest.mark.parametrize("content", ["", "[]", '{"bundles": 3}', '{"bundles": {"ab": 3}}', "\x00"])
def test_a_damaged_record_is_an_empty_one(content: str) -> None:
    record_path().parent.mkdir(parents=True)
    record_path().write_text(content)
    assert not was_written_here("ab", f"{HERE}:build")
    assert record_written("ab", f"{HERE}:build")
    assert was_written_here("ab", f"{HERE}:build")


def test_a_record_that_cannot_be_written_is_no_error(state: Path) -> None:
    state.write_text("a file where the folder should be")
    assert not record_written("ab", f"{HERE}:build")
    assert not was_written_here("ab", f"{HERE}:build")


def test_a_relative_state_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/nowhere")
    assert os.fspath(record_path()) == "/nowhere/.local/state/bnctl/written.json"
