"""The tour: every stop does what it says, and it minds what lies in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnctl.commands import demo
from bnctl.errors import ExitCode

WRITTEN = {"inserted", "round_trip", "kept.onnx", "folded.onnx", "recalibrated", "recalibrated.onnx"}


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Without the latency column, which other tests measure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_ratios", lambda words, progress: dict.fromkeys(words, "1"))


def percentages(out: str) -> dict[str, list[float]]:
    """Top-1 on test and on shifted images, by row of the last table."""
    rows = [line.replace("│", " ").split("  ") for line in out.splitlines() if line.count("%") == 2 and "[" not in line]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {name: [float(a.split()[0]), float(b.split()[0])] for name, a, b, *_ in cells}


def test_the_tour(short, cli):
    ended = cli("demo", "-o", "tour")
    assert ended.code == ExitCode.OK, ended.err
    assert {path.name for path in Path("tour").iterdir()} == WRITTEN
    assert ended.out.count("$ bnctl ") == 8
    found = percentages(ended.out)
    assert found["BN inserted"] == found["trained without BN (torch)"] == found["BN folded again"]
    assert found["folded"] == found["exported, BN kept"] == found["trained with BN (torch)"]
    assert found["recalibrated, folded"] == found["recalibrated"]
    assert found["recalibrated"][1] > found["folded"][1] + 5, "recalibration on shifted images helps there"


def test_what_lies_there_is_not_overwritten(short, cli):
    Path("tour").mkdir()
    Path("tour/thesis.tex").write_text("mine")
    for words in ((), ("--force",)):
        ended = cli("demo", "-o", "tour", *words)
        assert ended.code == ExitCode.USAGE
        assert "thesis.tex" in ended.err
    Path("tour/thesis.tex").unlink()
    Path("tour/kept.onnx").write_text("of an earlier tour")
    assert cli("demo", "-o", "tour").code == ExitCode.USAGE
    assert Path("tour/kept.onnx").read_text() == "of an earlier tour"


def test_a_failed_step_fails_the_tour(short, cli, monkeypatch):
    from dataclasses import replace

    from bnctl.commands.verify import run_verify

    step = demo.Step("A step that fails.", ["verify", "a", "b"], lambda tell: replace(done, exit_code=ExitCode.FAILED))
    from bnctl.commands.setup import Setup
    from conftest import ONNX_BN

    done = run_verify(ONNX_BN, ONNX_BN, Setup(), tolerance=None)
    monkeypatch.setattr(demo, "_steps", lambda *_: [step])
    monkeypatch.setattr(demo, "_table", lambda *_: "")
    assert cli("demo", "-o", "tour").code == ExitCode.FAILED
    assert cli("demo", "-o", "tour", "--quiet").out == ""
