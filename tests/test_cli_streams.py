"""A stdout that takes nothing: the exit code does not lie, and nothing is blamed on bnctl."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MAIN, ONNX_BN, ONNX_PLAIN, TEST

FULL = Path("/dev/full")
FAILED = ("verify", ONNX_BN, ONNX_PLAIN, "--data", TEST, "--limit", "8")
PASSED = ("verify", ONNX_BN, ONNX_BN, "--data", TEST, "--limit", "8")


def ended(tmp_path: Path, redirected: str, *words: str) -> tuple[int, str]:
    command = ["sh", "-c", f'main="$1"; shift; "$0" -c "$main" "$@" {redirected}', sys.executable, MAIN, *words]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*PASSED, "--json"), "ended with exit code 0"),
        (PASSED, "ended with exit code 0"),
        ((*FAILED, "--json"), "ended with exit code 1"),
        (("fold", ONNX_BN, "-o", "out.onnx", "--json"), "out.onnx was written"),
        (("explain",), "No space left"),
        (("explain", "--json"), "No space left"),
        (("--version",), "No space left"),
        (("inspect", "none.onnx", "--json"), "no such file"),
    ],
    ids=str,
)
def test_a_full_disk_is_no_verdict(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    code, error = ended(tmp_path, "> /dev/full", *words)
    assert code == 2
    assert said in error


@pytest.mark.parametrize(
    ("words", "code"),
    [(PASSED, 0), (FAILED, 1), ((*FAILED, "--json"), 1), (("inspect", "none.onnx", "--json"), 2), (("--version",), 0)],
    ids=str,
)
@pytest.mark.parametrize("redirected", [">&-", ">&- 2>&-"])
def test_a_closed_stdout_changes_nothing(tmp_path: Path, words: tuple[str, ...], code: int, redirected: str) -> None:
    assert ended(tmp_path, redirected, *words)[0] == code
