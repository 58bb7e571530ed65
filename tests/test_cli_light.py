"""What is not imported: help in an instant, and ONNX work without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import ONNX_BN, ONNX_PLAIN, TEST

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "scipy", "PIL")
PROBE = """
import sys
from bnctl.cli.app import run
code = run(sys.argv[1:]) if len(sys.argv) > 1 else 0
print("IMPORTED", code, *sorted(name for name in sys.modules if "." not in name), file=sys.stderr)
"""


def imported(*words: str, source: str = PROBE) -> tuple[int, set[str]]:
    """The exit code, and the top-level packages that a command line imports."""
    done = subprocess.run([sys.executable, "-c", source, *words], capture_output=True, text=True, check=True)
    _, code, *names = done.stderr.strip().splitlines()[-1].split()
    return int(code), set(names)


@pytest.mark.parametrize(
    "words", [(), ("--help",), ("--version",), ("fold", "--help"), ("bench", "--help"), ("explain", "BN101")]
)
def test_help_is_light(words):
    code, names = imported(*words)
    assert code == 0
    assert not names & set(HEAVY)


def test_import_bnctl_is_light():
    _, names = imported(source='import bnctl, sys; print("IMPORTED", 0, *sys.modules, file=sys.stderr)')
    assert "bnctl" in names
    assert not names & {*HEAVY, "numpy", "typer", "rich"}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (0, ("fold", ONNX_BN, "-o", "y.onnx")),
        (0, ("inspect", ONNX_BN)),
        (1, ("check", ONNX_BN)),
        (1, ("verify", ONNX_BN, ONNX_PLAIN, "--data", TEST, "--limit", "8")),
        (0, ("insert", ONNX_PLAIN, "-o", "z.onnx", "--data", TEST, "--limit", "8")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_onnx_work_never_imports_torch(wanted, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, names = imported(*words)
    assert code == wanted
    assert "onnx_ir" in names
    assert "torch" not in names


def test_the_probe_sees_torch():
    _, names = imported("inspect", "bnctl.fixture:plain", "--input", "1x1x8x8")
    assert "torch" in names
