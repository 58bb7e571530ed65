"""What a user meets who takes results further: modes, formats, what is left of merged layers, names in errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bnctl
from bnctl.data.batches import Batch
from bnctl.errors import ModelError, UsageError
from bnctl.runtime.torch import TorchRunner
from conftest import BN, MAIN, TEST
from nets_traps import Net, _fast, error, outputs, randomise  # noqa: F401
from test_torch_exported_code import Branches

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def test_a_fold_keeps_the_modes() -> None:
    model = small().train()
    model[3].eval()
    result = bnctl.fold(model, image(), where="1")
    folded = result.model
    assert [m.training for m in folded] == [m.training for m in model]
    assert folded.training
    assert isinstance(folded[1], nn.Identity)
    model.eval()
    folded.eval()
    x = image()
    assert error(outputs(model, x), outputs(folded, x)) < 1e-5


def test_merged_layers_and_their_parameters_go() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(Branches(), Branches()))
    result = bnctl.fold(model, torch.randn(2, 4, 8, 8), merge_branches=True)
    kinds = [type(m).__name__ for m in result.model.modules() if not list(m.children())]
    assert kinds.count("Conv2d") == 2
    assert kinds.count("BatchNorm2d") == 0
    assert sorted(result.model.state_dict()) == ["0.c.bias", "0.c.weight", "1.c.bias", "1.c.weight"]
    x = torch.randn(1, 4, 8, 8)
    assert error(outputs(model, x, torch.float64), outputs(result.model, x)) < 1e-5


def test_a_layer_that_is_also_called_elsewhere_stays() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda s, x: (s.c(x) + s.p(x)).relu() + s.p(x.sigmoid()).tanh(), c=nn.Conv2d(4, 4, 1), p=nn.Conv2d(4, 4, 1)
    )
    result = bnctl.fold(model, torch.randn(2, 4, 8, 8), merge_branches=True)
    x = torch.randn(1, 4, 8, 8)
    assert error(outputs(model, x, torch.float64), outputs(result.model, x)) < 1e-5
    assert isinstance(result.model.p, nn.Conv2d)


class Cast(nn.Module):
    """Runs in half precision by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.d, self.e = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.e(self.d(self.b(self.c(x)).relu())).float()  # type: ignore[no-any-return]


def test_autocast_is_named() -> None:
    result = bnctl.fold(randomise(Cast()), image())
    assert {s.name: s.code for s in result.report.sites} == {"b": "BN108", "e": "BN108"}
    assert all("casts its weight to bfloat16" in str(s.reason) for s in result.report.sites)
    assert result.model.d.weight.dtype == torch.float32


def test_layers_with_computed_weights_take_no_norm() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    result = bnctl.insert(model, [image(8), image(8)])
    assert {s.name: s.code for s in result.report.sites}["0"] == "BN108"


class Two(NamedTuple):
    """Two outputs with names."""

    a: Tensor
    b: Tensor


class Named(nn.Module):
    """Returns its outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()[:2]

    def forward(self, x: Tensor) -> Two:
        y = self.body(x)
        return Two(y, y.relu())


def test_what_torch_export_cannot_write_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    result = bnctl.fold(randomise(Named()), image())
    with pytest.raises(ModelError, match=r"torch\.export cannot write Named") as caught:
        result.save(tmp_path / "o.pt2")
    assert "bundle" in str(caught.value.hint)
    result.save(tmp_path / "o.onnx")
    assert not (tmp_path / "o.pt2").exists()


def test_a_result_knows_the_inputs_that_it_came_from(tmp_path: Path) -> None:
    model = randomise(small())
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim("b")},))
    torch.export.save(program, tmp_path / "m.pt2")
    result = bnctl.fold(str(tmp_path / "m.pt2"), image())
    result.save(tmp_path / "o.pt2")
    result.save(tmp_path / "o.onnx")
    assert bnctl.verify(model, str(tmp_path / "o.pt2"), [image(3)]).passed
    assert bnctl.verify(model, str(tmp_path / "o.onnx"), [image(3)]).passed


def test_verify_draws_what_both_models_take(cli: Any, tmp_path: Path) -> None:
    words = ("export", BN, "--data", TEST)
    assert cli(*words, "-o", tmp_path / "any.onnx").code == 0
    assert cli(*words, "-o", tmp_path / "fixed.onnx", "--static-batch", "--keep-bn", "--batch-size", "5").code == 0
    for pair in (("any.onnx", "fixed.onnx"), ("fixed.onnx", "any.onnx")):
        ended = cli("verify", *(tmp_path / name for name in pair))
        assert ended.code == 0, ended.out + ended.err


@pytest.mark.parametrize(("data", "said"), [("nosuch.npz", "nosuch.npz: no such file"), ("random:zz", "random:zz")])
def test_data_beside_an_input_must_be_there(cli: Any, data: str, said: str) -> None:
    ended = cli("fold", BN, "--input", "2x1x8x8", "--data", data, "--dry-run")
    assert ended.code == 2
    assert said in ended.err


class InPlace(nn.Module):
    """Writes into its input, and works less where that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        self.seen.append(float(x.sum()) + len(more))
        more.pop("mask")
        return x.mul_(1e10)


def test_prepared_inputs_are_renewed() -> None:
    model = InPlace()
    given = {"mask": np.ones((2, 3), np.float32)}
    with TorchRunner(model).prepared(Batch((np.ones((2, 3), np.float32), given))) as call:
        for _ in range(4):
            call()
            call.renew()
        assert model.seen == [7.0] * 4
    with TorchRunner(model).prepared(Batch((np.ones((2, 3), np.float32), {"mask": given["mask"]}))) as call:
        call()
        with pytest.raises(ModelError, match="InPlace fails on inputs"):  # the control: the mask is gone
            call()


def test_errors_name_the_model_as_the_user_did(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_nets.py").write_text(
        "import sys\nfrom bnctl.fixture import with_bn\n"
        "def raising():\n    model = with_bn()\n    model.register_forward_hook(lambda *a: 1 / 0)\n    return model\n"
        "def leaving():\n    model = with_bn()\n    model.register_forward_hook(lambda *a: sys.exit(0))\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, said in (("raising", "ZeroDivisionError"), ("leaving", "sys.exit(0)")):
        word = f"failing_nets:{name}"
        ended = cli("bench", BN, word, "--data", TEST, "--no-latency", "--gate", "flips<=0", "--trust")
        assert ended.code == 2
        assert word in ended.err
        assert said in ended.err


def test_fewer_processes_are_taken_at_their_word(cli: Any) -> None:
    words = ("bench", BN, BN, "--data", TEST, "--no-accuracy", "--processes", "4", "--max-processes", "3")
    ended = cli(*words)
    assert ended.code == 2
    assert "max_processes must not be less than processes" in ended.err.replace("\n", " ")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("politely", [True, False])
def test_a_bench_that_is_ended_politely_leaves_nothing(tmp_path: Path, politely: bool) -> None:
    """Not its worker, and no folder. The control: one that is killed leaves both."""
    (tmp_path / "sleeping.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom bnctl.fixture import with_bn\n"
        "def build():\n"
        "    if sys.argv[0].endswith('worker.py'):\n"
        "        Path('pid.new').write_text(str(os.getpid()))\n        Path('pid.new').rename('pid')\n        time.sleep(100)\n"
        "    return with_bn()\n"
    )
    words = ["bench", "bnctl.fixture:with_bn", "sleeping:build", "--data", TEST, "--no-accuracy", "--trust"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGTERM if politely else signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    if politely:
        assert process.returncode == 130, out
        assert not list(tmp_path.glob("bnctl-*"))
        assert not _runs(worker)
    else:
        assert list(tmp_path.glob("bnctl-*"))
        assert _runs(worker)
        os.kill(worker, signal.SIGKILL)


def _runs(process: int) -> bool:
    """Whether there is such a process, and it has not ended: nobody may have asked yet how."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_prior_that_is_no_number() -> None:
    with pytest.raises(UsageError, match="the prior is"):
        bnctl.recalibrate(small().eval(), [image(8)], prior=True)
