"""A bundle remembers what its inputs look like, so that later commands need no --input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bnctl.cli.app import run
from bnctl.data.batches import Batch
from bnctl.data.synthetic import specs_of
from bnctl.fixture import fixture_path


def test_specs_of_a_batch() -> None:
    batch = Batch((np.zeros((2, 3), np.float32),), {"mask": np.zeros((2, 4), np.int64)})
    assert [str(spec) for spec in specs_of(batch)] == ["2x3:float32", "mask:2x4:int64"]
    assert specs_of(Batch(([np.zeros(3)],))) == ()


def test_export_of_a_bundle_needs_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = f"bnctl.fixture:with_bn@{fixture_path('digits_bn.safetensors')}"
    assert run(["fold", word, "--input", "2x1x8x8", "-o", str(tmp_path / "b"), "--quiet"]) == 0
    assert run(["export", str(tmp_path / "b"), "-o", str(tmp_path / "m.onnx"), "--quiet"]) == 0
    assert run(["inspect", word]) == 2, "a factory does not say what its inputs look like"
    assert "--input" in capsys.readouterr().err
