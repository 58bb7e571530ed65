"""How the process ends, as one table; and that nobody ever sees a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bnctl.errors import ExitCode
from conftest import BN, CALIBRATION, INPUT, MAIN, ONNX_BN, ONNX_PLAIN, PLAIN, TEST, faults

NETS = """
import os, sys
import torch
from bnctl.fixture import with_bn

def raises(): raise ValueError("no such width")
def ends(): sys.exit(0)
def number(): return 3
class Crash(torch.nn.Module):
    def forward(self, x): os._exit(1)
def crash(): return Crash()
def left_in_train(): return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2, track_running_stats=False))
def bad_batches(): raise OSError("disk")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with everything that can be wrong in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "exit_nets", raising=False)
    Path("exit_nets.py").write_text(NETS)
    Path("broken.onnx").write_bytes(b"\x08\x09 not a model")
    Path("empty.onnx").write_bytes(b"")
    Path("broken.pt2").write_bytes(b"PK nothing")
    Path("broken.npz").write_bytes(b"text")
    Path("weights.pt").write_bytes(b"\x80\x02.")
    Path("exists.onnx").write_bytes(b"mine")
    Path("plain_folder").mkdir()
    np.savez("nan.npz", x=np.full((4, 1, 8, 8), np.nan, np.float32))
    np.savez("colour.npz", x=np.zeros((4, 3, 8, 8), np.float32))
    np.savez("no_x.npz", z=np.zeros(3))
    return tmp_path


GATE = ("bench", ONNX_BN, ONNX_BN, "--data", TEST, "--no-latency", "--gate")
OTHER = ("bench", ONNX_BN, ONNX_PLAIN, "--data", TEST, "--no-latency", "--gate")
FOLD = ("fold", ONNX_BN, "-o", "out.onnx")

TABLE = {
    "fold": (0, FOLD),
    "version": (0, ("--version",)),
    "help": (0, ("fold", "--help")),
    "the same model": (0, ("verify", ONNX_BN, ONNX_BN)),
    "a gate that holds": (0, (*GATE, "flips<=0")),
    "a clean model": (0, ("check", ONNX_PLAIN)),
    "no gates": (0, ("bench", ONNX_BN, ONNX_PLAIN, "--data", TEST, "--no-latency")),
    "two models that differ": (1, ("verify", ONNX_BN, ONNX_PLAIN)),
    "a gate that fails": (1, (*OTHER, "flips<=0")),
    "one failing gate of two": (1, (*OTHER, "top1.drop<=99", "--gate", "flips<=0")),
    "findings": (1, ("check", ONNX_BN)),
    "batch statistics": (1, ("check", "exit_nets:left_in_train", "--input", INPUT)),
    "no command": (2, ()),
    "unknown command": (2, ("unfold", ONNX_BN)),
    "unknown option": (2, ("fold", ONNX_BN, "--fast")),
    "no model": (2, ("fold",)),
    "bad number": (2, ("fold", ONNX_BN, "-o", "x.onnx", "--batch-size", "many")),
    "batch of none": (2, ("fold", ONNX_BN, "-o", "x.onnx", "--batch-size", "0")),
    "unknown code": (2, ("explain", "BN999")),
    "missing file": (2, ("inspect", "missing.onnx")),
    "no suffix": (2, ("inspect", "missing")),
    "a pickle": (2, ("inspect", "weights.pt")),
    "weights only": (2, ("inspect", BN.partition("@")[2])),
    "broken onnx": (2, ("inspect", "broken.onnx")),
    "empty onnx": (2, ("inspect", "empty.onnx")),
    "broken pt2": (2, ("inspect", "broken.pt2", "--input", INPUT)),
    "no bundle": (2, ("inspect", "plain_folder", "--input", INPUT)),
    "untrusted bundle": (2, ("inspect", "evil", "--input", INPUT)),
    "factory raises": (2, ("inspect", "exit_nets:raises", "--input", INPUT)),
    "factory exits": (2, ("inspect", "exit_nets:ends", "--input", INPUT)),
    "factory returns no model": (2, ("inspect", "exit_nets:number", "--input", INPUT)),
    "no such factory": (2, ("inspect", "exit_nets:missing", "--input", INPUT)),
    "no such module": (2, ("inspect", "nowhere.nets:build", "--input", INPUT)),
    "bad model argument": (2, ("inspect", BN, "--model-arg", "width")),
    "argument nobody takes": (2, ("inspect", BN, "--model-arg", "width=3", "--input", INPUT)),
    "argument for a file": (2, ("inspect", ONNX_BN, "--model-arg", "width=3")),
    "weights for a file": (2, ("inspect", ONNX_BN, "--weights", "weights.pt")),
    "factory for a file": (2, ("inspect", ONNX_BN, "--factory", "exit_nets:raises")),
    "bad weights": (2, ("inspect", "bnctl.fixture:plain", "--weights", "weights.pt", "--input", INPUT)),
    "no inputs": (2, ("inspect", BN)),
    "bad shape word": (2, ("inspect", BN, "--input", "two")),
    "wrong shape": (2, ("inspect", BN, "--input", "1x3x8x8")),
    "wrong shape, onnx": (2, ("verify", ONNX_BN, ONNX_BN, "--input", "1x3x8x8")),
    "wrong name": (2, ("verify", ONNX_BN, ONNX_BN, "--input", "other:1x1x8x8")),
    "missing data": (2, ("insert", PLAIN, "-o", "out", "--data", "missing.npz")),
    "no data": (2, ("insert", PLAIN, "-o", "out")),
    "broken npz": (2, ("insert", PLAIN, "-o", "out", "--data", "broken.npz")),
    "npz without x": (2, ("insert", PLAIN, "-o", "out", "--data", "no_x.npz")),
    "not finite": (2, ("insert", PLAIN, "-o", "out", "--data", "nan.npz")),
    "not finite, recalibrate": (2, ("recalibrate", BN, "-o", "out", "--data", "nan.npz")),
    "colour images": (2, ("insert", PLAIN, "-o", "out", "--data", "colour.npz")),
    "loader raises": (2, ("insert", PLAIN, "-o", "out", "--data", "exit_nets:bad_batches")),
    "random without shape": (2, ("insert", PLAIN, "-o", "out", "--data", "random:8")),
    "no output": (2, ("fold", ONNX_BN)),
    "existing output": (2, ("fold", ONNX_BN, "-o", "exists.onnx")),
    "output folder missing": (2, ("fold", ONNX_BN, "-o", "nowhere/out.onnx")),
    "onnx as bundle": (2, ("fold", ONNX_BN, "-o", "bundle")),
    "output of a pickle": (2, ("fold", BN, "-o", "out.pt", "--input", INPUT)),
    "export as bundle": (2, ("export", BN, "-o", "out", "--input", INPUT)),
    "nothing matches": (2, (*FOLD, "--where", "layer9.*")),
    "nothing matches skip": (2, (*FOLD, "--skip", "layer9.*")),
    "nothing matches, recalibrate": (2, ("recalibrate", BN, "--dry-run", "--data", CALIBRATION, "--where", "layer9.*")),
    "recalibrate onnx": (0, ("recalibrate", ONNX_BN, "-o", "out.onnx", "--data", CALIBRATION)),
    "recalibrate without a norm": (2, ("recalibrate", ONNX_PLAIN, "-o", "out.onnx", "--data", CALIBRATION)),
    "until for onnx": (0, ("recalibrate", ONNX_BN, "-o", "out.onnx", "--data", CALIBRATION, "--until", "0.1")),
    "resume for onnx": (0, ("recalibrate", ONNX_BN, "-o", "out.onnx", "--data", CALIBRATION, "--resume")),
    "bad gate": (2, (*GATE, "top1.drop=0")),
    "unknown metric": (2, (*GATE, "top9.drop<=0")),
    "gate on what is off": (2, (*GATE, "latency.ratio<=1")),
    "gate without labels": (2, ("bench", ONNX_BN, ONNX_BN, "--data", "random:8", "--input", INPUT, "--no-latency", "--gate", "top1.drop<=1")),
    "nothing to measure": (2, ("bench", ONNX_BN, ONNX_BN, "--data", TEST, "--no-latency", "--no-accuracy")),
    "one model": (2, ("bench", ONNX_BN, "--data", TEST)),
    "worker crash": (2, ("bench", "exit_nets:crash", "exit_nets:crash", "--data", TEST, "--no-accuracy", "--gate", "latency.ratio<=9")),
    "equal on all samples is no proof": (3, (*GATE, "top1.drop<=0.1")),
    "one inconclusive gate of two": (3, (*GATE, "top1.drop<=0.1", "--gate", "flips<=0")),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle that names a command as its factory."""
    from bnctl.cli.app import run

    path = tmp_path_factory.mktemp("bundle") / "evil"
    assert run(["insert", PLAIN, "-o", str(path), "--data", CALIBRATION, "--quiet"]) == 0
    document = json.loads((path / "bnctl.json").read_text())
    assert document["factory"] == "bnctl.fixture:plain"
    (path / "bnctl.json").write_text(json.dumps(document | {"factory": "os:system", "args": {"command": "touch ran"}}))
    return path


@pytest.mark.parametrize("case", TABLE)
def test_exit_code(case, cli, folder, bundle):
    shutil.copytree(bundle, "evil")
    wanted, words = TABLE[case]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    ended = cli(*words)
    assert ended.code == wanted, ended.err
    if wanted == ExitCode.USAGE and words:
        assert ended.err.startswith("error: ")
        assert " hint: " in ended.err, "no next step"
        assert len(ended.err.splitlines()[0]) > len("error: ") + 5
        after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert after == before, "something was written, or changed, or ran"
    else:
        assert "error" not in ended.err


@pytest.mark.parametrize("case", [case for case, (code, _) in TABLE.items() if code == ExitCode.USAGE])
def test_errors_are_one_json_document_too(case, cli, folder, bundle):
    words = TABLE[case][1]
    if not words or case == "worker crash":
        pytest.skip("covered by the others")
    shutil.copytree(bundle, "evil")
    if words[0] == "explain":
        pytest.skip("explain writes no report")
    ended = cli(*words, "--json")
    assert ended.code == ExitCode.USAGE
    assert faults(ended.document) == []
    assert ended.document["error"]["exit_code"] == ExitCode.USAGE
    assert ended.document["error"]["hint"]


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("a bug"), 4), (KeyboardInterrupt(), 130), (RecursionError(), 4)]
)
def test_bugs_and_interruptions(error, code, cli, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr("bnctl.commands.inspect.run_inspect", fails)
    ended = cli("inspect", ONNX_BN, "--json")
    assert ended.code == code
    assert faults(ended.document) == []
    assert ended.document["error"]["exit_code"] == code
    if code == ExitCode.INTERNAL:
        assert "BNCTL_TRACEBACK=1" in ended.err


def test_a_traceback_for_those_who_ask(monkeypatch, capsys):
    from bnctl.cli.app import run

    def fails(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("bnctl.commands.inspect.run_inspect", fails)
    monkeypatch.setenv("BNCTL_TRACEBACK", "1")
    assert run(["inspect", ONNX_BN]) == ExitCode.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_a_changed_function_is_a_failure_and_nothing_is_written(cli, tmp_path, monkeypatch):
    from bnctl.engines.onnx.engine import OnnxEngine

    real = OnnxEngine.fold

    def wrong(self, captured, plan):
        model = real(self, captured, plan)
        import onnx_ir

        bias = next(v for v in model.native.graph.initializers.values() if v.const_value.size == 16)
        bias.const_value = onnx_ir.tensor(bias.const_value.numpy() + 1)
        return model

    monkeypatch.setattr(OnnxEngine, "fold", wrong)
    ended = cli("fold", ONNX_BN, "-o", tmp_path / "out.onnx", "--json")
    assert ended.code == ExitCode.FAILED
    assert not list(tmp_path.iterdir())
    assert faults(ended.document) == []
    assert ended.document["verification"]["passed"] is False
    assert "Nothing was written" in ended.err


def test_ctrl_c_ends_a_bench_and_its_workers(tmp_path):
    words = [
        "bench",
        ONNX_BN,
        ONNX_BN,
        "--data",
        TEST,
        "--no-accuracy",
        "--processes",
        "99",
        "--max-processes",
        "99",
        "--json",
    ]
    bench = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    while bench.poll() is None and not children.read_text():
        time.sleep(0.02)
    worker = int(children.read_text().split()[0])
    os.killpg(bench.pid, signal.SIGINT)  # as a terminal does
    out, err = bench.communicate(timeout=60)
    assert bench.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in err
    assert json.loads(out)["error"]["message"] == "interrupted"
    ends = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < ends:
        time.sleep(0.05)  # it got the signal, too, and may be the last to end
    assert not Path(f"/proc/{worker}").exists()
    assert not list(tmp_path.glob("bnctl-*")), "temporary files are left"


def test_a_reader_that_leaves_does_not_turn_red_into_green():
    check = subprocess.Popen(
        [sys.executable, "-m", "bnctl", "check", ONNX_BN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    check.stdout.close()
    err = check.stderr.read()
    check.stderr.close()
    assert check.wait() == ExitCode.FAILED
    assert err == ""


@pytest.mark.parametrize("form", ["human", "markdown"])
@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_knows_ascii_only(encoding, form, tmp_path):
    words = ["inspect", ONNX_BN, "--format", form]
    ended = subprocess.run(
        [sys.executable, "-m", "bnctl", *words], env=os.environ | encoding, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()
    assert b"5 found - 5 foldable" in ended.stdout


def test_what_the_users_code_prints_is_talk(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("talkative.py").write_text(
        "from bnctl.fixture import with_bn\nprint('imported')\n"
        "def build():\n    print('built')\n    net = with_bn()\n"
        "    net.register_forward_hook(lambda *_: print('ran'))\n    return net\n"
    )
    weights = BN.partition("@")[2]
    ended = cli("fold", f"talkative:build@{weights}", "--input", INPUT, "--dry-run", "--json")
    assert ended.code == 0
    assert ended.document["summary"]["folded"] == 5
    assert {"imported", "built", "ran"} <= set(ended.err.split())
