from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnctl.engines.torch.edits import apply_edits
from bnctl.errors import ModelError, UntrustedError, UsageError
from bnctl.models.bundle import load_bundle, save_bundle
from bnctl.models.origin import Origin

HERE = "test_models_bundle"


class Net(nn.Module):
    def __init__(self, width: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.encode = nn.Linear(width, width, bias=False)
        self.decode = nn.Linear(width, width, bias=False)
        if tied:
            self.decode.weight = self.encode.weight
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).mean((2, 3))
        return self.decode(self.encode(y)) * self.scale


class Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return {"not": "a tensor"}

    def set_extra_state(self, state: Any) -> None: ...


def build(**args: Any) -> nn.Module:
    return Net(**args)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def random_net(**args: Any) -> Net:
    net = Net(**args)
    with torch.no_grad():
        for tensor in [*net.parameters(), net.norm.running_mean, net.norm.running_var]:
            tensor.uniform_(0.5, 2.0)
    return net.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(2, 3, 5, 5, dtype=next(a.parameters()).dtype)
    left, right = a.state_dict(), b.state_dict()
    return (
        torch.equal(a(x), b(x)) and left.keys() == right.keys() and all(left[k].dtype == right[k].dtype for k in left)
    )


def save(folder: Path, net: nn.Module, factory: str = f"{HERE}:Net", **args: Any) -> Path:
    save_bundle(folder / "b", net, Origin(factory, args))
    return folder / "b"


def edit(bundle: Path, **changes: Any) -> None:
    document = json.loads((bundle / "bnctl.json").read_text())
    (bundle / "bnctl.json").write_text(json.dumps({**document, **changes}))


def test_a_bundle_comes_back_as_the_same_class(tmp_path: Path) -> None:
    net = random_net(width=6)
    net.norm.weight.requires_grad_(False)
    origin = Origin(f"{HERE}:Net", {"width": 6}, weights="w.pt")
    save_bundle(tmp_path / "b", net, origin, source={"path": "x"}, inputs=[[1, 3, 5, 5]])
    module, again = load_bundle(tmp_path / "b")
    assert type(module) is Net and again == origin
    assert same(net, module)
    assert not module.training
    assert not module.norm.weight.requires_grad and module.norm.bias.requires_grad
    document = json.loads((tmp_path / "b" / "bnctl.json").read_text())
    assert document["format"] == "bnctl-bundle" and document["format_version"] == 1
    assert document["inputs"] == [[1, 3, 5, 5]] and document["source"] == {"path": "x"}


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    bundle = save(tmp_path, random_net())
    with safe_open(bundle / "model.safetensors", "pt") as file:
        assert "encode.weight" in file.keys() and "decode.weight" not in file.keys()  # noqa: SIM118 - not a dict
    module, _ = load_bundle(bundle)
    assert module.decode.weight is module.encode.weight


def test_a_tie_that_was_cut_stays_cut(tmp_path: Path) -> None:
    net = random_net()
    net.decode.weight = nn.Parameter(net.encode.weight.detach() * 2)
    module, _ = load_bundle(save(tmp_path, net))  # the factory ties them
    assert module.decode.weight is not module.encode.weight
    assert same(net, module)


def test_a_tie_that_was_made_is_made_again(tmp_path: Path) -> None:
    net = random_net(tied=False)
    net.decode.weight = net.encode.weight
    module, _ = load_bundle(save(tmp_path, net, tied=False))
    assert module.decode.weight is module.encode.weight
    assert same(net, module)


def test_views_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    net = random_net(tied=False)
    both = torch.randn(8, 4)
    net.encode.weight, net.decode.weight = nn.Parameter(both[:4]), nn.Parameter(both[2:6])
    net.conv.weight = nn.Parameter(net.conv.weight.detach().to(memory_format=torch.channels_last))
    again = load_bundle(save(tmp_path, net, tied=False))[0].state_dict()
    # Values, not outputs: another memory format is another convolution kernel, which rounds differently.
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    net = random_net().to(dtype)
    module, _ = load_bundle(save(tmp_path, net))
    assert module.scale.dtype == dtype  # not in the state dict, and still
    assert same(net, module)


def test_an_empty_module_and_train_mode(tmp_path: Path) -> None:
    module, _ = load_bundle(save(tmp_path, nn.Identity().train(), "torch.nn:Identity"))
    assert module.training


def test_edits_are_applied_before_the_state(tmp_path: Path) -> None:
    origin = Origin(f"{HERE}:Net").edited(
        {"edit": "remove", "module": "norm", "tail": []},
        {"edit": "insert", "module": "conv", "norm": "BatchNorm2d", "features": 4, "eps": 1e-3},
    )
    net = random_net()
    apply_edits(net, origin.edits)
    save_bundle(tmp_path / "b", net, origin)
    module, again = load_bundle(tmp_path / "b")
    assert again == origin and isinstance(module.norm, nn.Identity)
    assert same(net, module)
    edit(tmp_path / "b", edits=[{"edit": "remove", "module": "nothing"}])
    with pytest.raises(ModelError, match="nothing"):
        load_bundle(tmp_path / "b", trust=True)
    edit(tmp_path / "b", edits=[])
    with pytest.raises(ModelError, match=r"5 missing: norm\.weight"):
        load_bundle(tmp_path / "b", trust=True)


def test_a_planted_command_does_not_run(tmp_path: Path) -> None:
    bundle, marker = save(tmp_path, random_net()), tmp_path / "marker"
    edit(bundle, factory="os:system", args={"command": f"touch {marker}"})
    with pytest.raises(UntrustedError, match="os:system"):
        load_bundle(bundle)
    assert not marker.exists()
    with pytest.raises(ModelError, match="returned a int"):
        load_bundle(bundle, trust=True)
    assert marker.exists()  # the attack is real: whoever trusts the bundle runs it


def test_a_module_class_of_a_foreign_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import os\nfrom torch import nn\nclass Evil(nn.Module):\n"
        "    def __init__(self, command):\n        super().__init__()\n        os.system(command)\n"
    )
    (tmp_path / "bnctl_test_hostile.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    bundle, marker = save(tmp_path, nn.Identity(), "torch.nn:Identity"), tmp_path / "marker"
    edit(bundle, factory="bnctl_test_hostile:Evil", args={"command": f"touch {marker}"})
    with pytest.raises(UntrustedError):
        load_bundle(bundle)
    assert not marker.exists()
    load_bundle(bundle, trust=True)
    assert marker.exists()


def test_ones_own_bundle_loads_without_asking_until_it_is_changed(tmp_path: Path) -> None:
    bundle = save(tmp_path, random_net(), f"{HERE}:build")
    shutil.copytree(bundle, tmp_path / "moved")
    load_bundle(tmp_path / "moved")
    edit(bundle, training=True)
    with pytest.raises(UntrustedError, match=f"{HERE}:build"):
        load_bundle(bundle)
    assert load_bundle(bundle, trust=True)[0].training
    load_bundle(bundle, trusted_factories=[f"{HERE}:*"])
    load_bundle(bundle, factory=f"{HERE}:Net")
    load_bundle(bundle, factory=Net)


def test_tampering_and_truncation_are_named(tmp_path: Path) -> None:
    bundle = save(tmp_path, random_net())
    path = bundle / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="changed or cut off"):
            load_bundle(bundle)
    path.unlink()
    with pytest.raises(ModelError, match="no such file"):
        load_bundle(bundle)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    bundle = save(tmp_path, random_net())
    edit(bundle, args={"width": 5})
    with pytest.raises(ModelError, match=r"conv\.weight \(4x3x1x1, not 5x3x1x1\)"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, "format"),
        ({"format_version": 2}, "version 2"),
        ({"factory": 3}, '"factory" is int'),
        ({"args": []}, '"args" is list'),
        ({"edits": ["x"]}, "objects"),
        ({"state_sha256": "../x"}, "SHA-256"),
        ({"ties": {"..": "conv.weight"}}, "not the name"),
        ({"ties": {"a": "../../x"}}, "not the name"),
        ({"ties": {"decode.weight": "gone"}}, "gone"),
        ({"frozen": ["a..b"]}, "not the name"),
        ({"frozen": [3]}, "not the name"),
        ({"buffer_dtypes": {"scale": "load"}}, "dtype load"),
        ({"training": "yes"}, '"training" is str'),
    ],
)
def test_a_manifest_is_read_strictly(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bundle = save(tmp_path, random_net())
    edit(bundle, **changes)
    with pytest.raises(ModelError, match=message):
        load_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format": NaN}', b"[" * 100_000])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    bundle = save(tmp_path, random_net())
    (bundle / "bnctl.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"bnctl\.json"):
        load_bundle(bundle)


def test_what_cannot_be_stored_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="_extra_state"):
        save(tmp_path, Extra())
    with pytest.raises(ModelError, match="not JSON"):
        save(tmp_path, random_net(), act=nn.ReLU)
    with pytest.raises(ModelError, match="cannot be stored"):
        save(tmp_path, Net().to("meta"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_or_replaced_as_a_whole(tmp_path: Path) -> None:
    first, second = random_net(), random_net()
    bundle = save(tmp_path, first)
    with pytest.raises(UsageError, match="exists already"):
        save(tmp_path, second)
    assert same(load_bundle(bundle)[0], first)
    save_bundle(bundle, second, Origin(f"{HERE}:Net"), force=True)
    assert same(load_bundle(bundle)[0], second)
    with pytest.raises(ModelError):
        save_bundle(bundle, Extra(), Origin(f"{HERE}:Extra"), force=True)
    assert same(load_bundle(bundle)[0], second)


def test_force_replaces_nothing_but_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not a bundle"):
        save_bundle(tmp_path / "home", random_net(), Origin(f"{HERE}:Net"), force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


def test_a_full_disk_is_no_fault_of_the_model(tmp_path):
    """A limit on the size of files stands for it: what is written beyond fails as on a full disk."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from bnctl.cli.app import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    words = ["fold", "bnctl.fixture:with_bn", "--input", "2x1x8x8", "-o", "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "is there room on the disk?" in done.stderr
    assert not (tmp_path / "out").exists()
