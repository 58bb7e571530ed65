"""Recalibrating ONNX models: a run that is interrupted, and the one that goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bnctl.data.batches import Batch
from bnctl.engines.onnx import recalibrate as engine
from bnctl.engines.onnx.recalibration import schedules
from bnctl.errors import DataError, UsageError
from bnctl.fixture import fixture_path
from bnctl.recalibration.partial import Partial
from conftest import MAIN, stopped
from onnx_recalibration import bits, data, residual, split
from test_onnx_checks import FREE, Net

HOWS: list[dict[str, Any]] = [
    {},
    {"memory_bytes": 0},
    {"method": "batch"},
    {"method": "ema"},
    {"prior": 5.0},
    {"until": 0.2},
    {"until": 0.2, "method": "batch"},
    {"on_bad_batch": "skip"},
    {"on_bad_batch": "skip", "method": "ema"},
]


class Stopped(Exception):
    """What stops a run."""


def stopping(after: int) -> Callable[..., None]:
    """A progress that raises when it is told so many times."""
    told = 0

    def progress(what: str, done: int, total: int | None) -> None:
        nonlocal told
        told += 1
        if told == after:
            raise Stopped

    return progress


def batches() -> list[Batch]:
    x = data(200, 3, 8, 8)
    x[9, 0, 0, 0] = np.nan
    return split(x, *[4] * 50)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_result_is_the_same(how: dict[str, Any], tmp_path: Path) -> None:
    model, given = residual().model("y"), batches()
    if "on_bad_batch" not in how:
        given[2] = given[1]
    whole = engine.recalibrate(model, given, **how)
    stops = 0
    for after in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89):
        partial = Partial(tmp_path / f"{after}.partial", every_s=1e9)
        try:
            engine.recalibrate(model, given, progress=stopping(after), partial_file=partial, **how)
        except Stopped:
            stops += 1
        else:
            break
        assert (tmp_path / f"{after}.partial").exists()
        found = engine.recalibrate(model, given, partial_file=partial, resume=True, **how)
        assert bits(found.model) == bits(whole.model)
        assert (found.samples, found.skipped, found.enough) == (whole.samples, whole.skipped, whole.enough)
        assert found.standard_error == whole.standard_error
        assert [vars(s) | {"drift": None} for s in found.sites] == [vars(s) | {"drift": None} for s in whole.sites]
    assert stops >= 2


def test_what_is_known_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = residual().model("y"), split(data(200, 3, 8, 8), *[4] * 50)
    partial = Partial(tmp_path / "partial", every_s=1e9)

    def gone_on(method: Any, after: int) -> list[str]:
        told: list[str] = []
        with pytest.raises(Stopped):
            engine.recalibrate(model, given, method=method, progress=stopping(after), partial_file=partial)
        engine.recalibrate(
            model, given, method=method, partial_file=partial, resume=True, progress=lambda what, *_: told.append(what)
        )
        return told

    assert gone_on("ema", 40).count("gather") == 10
    levels: list[int] = []
    advance = schedules._advance
    monkeypatch.setattr(
        schedules,
        "_advance",
        lambda bench, border, parts, level, *more: levels.append(level) or advance(bench, border, parts, level, *more),
    )
    gone_on("exact", 2)
    assert sorted(levels) == list(range(len(levels)))  # each of them once, by one run or the other
    assert levels[:2] == [0, 1]
    assert len(levels) > 2


def test_half_precision_is_rounded_at_the_same_places(tmp_path: Path) -> None:
    """The runtime computes it in float32, and rounds what leaves a session."""
    net, name = Net(FREE, 32, 6, 6, dtype=np.float16), "x"
    for _ in range(5):
        name = net.add("Relu", net.bn(net.conv(name, 32, 32, 1), 32))
    model, given = net.model(name), split(data(24, 32, 6, 6).astype(np.float16), *[4] * 6)
    whole = bits(engine.recalibrate(model, given).model)
    assert bits(engine.recalibrate(model, given, memory_bytes=0).model) == whole
    for after in (1, 3, 4):
        partial = Partial(tmp_path / f"{after}.partial", every_s=1e9)
        with pytest.raises(Stopped):
            engine.recalibrate(model, given, progress=stopping(after), partial_file=partial)
        assert bits(engine.recalibrate(model, given, partial_file=partial, resume=True).model) == whole


def test_a_model_whose_external_data_changed_is_another(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proto = residual().proto("y")
    onnx.save(proto, "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    x = data(40, 3, 8, 8)
    x[-1] = np.nan
    np.savez("bad.npz", x=x)
    words = ("recalibrate", "model.onnx", "--data", "bad.npz", "--batch-size", "4", "--method", "ema", "-o", "out.onnx")
    assert cli(*words).code == 2
    assert Path("out.onnx.partial").exists()
    assert "holds NaN" in cli(*words, "--resume").err
    Path("model.data").write_bytes(Path("model.data").read_bytes()[::-1])
    assert "is of another run" in cli(*words, "--resume").err


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    model, given, path = residual().model("y"), split(data(12, 3, 8, 8), 4, 4, 4), tmp_path / "p"
    with pytest.raises(Stopped):
        engine.recalibrate(model, given, progress=stopping(1), partial_file=Partial(path))
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        try:
            Partial(path).read()
        except DataError as error:
            assert str(path) in error.message
            refused += 1
    assert refused > 100


def test_a_file_of_another_run(tmp_path: Path) -> None:
    model, given = residual().model("y"), split(data(12, 3, 8, 8), 4, 4, 4)
    with pytest.raises(Stopped):
        engine.recalibrate(model, given, progress=stopping(1), partial_file=Partial(tmp_path / "p", {"model": "a"}))
    with pytest.raises(UsageError, match="model was a and is b"):
        engine.recalibrate(model, given, partial_file=Partial(tmp_path / "p", {"model": "b"}), resume=True)


LOADER = """
import os, time
import numpy as np
from bnctl.fixture import fixture_path

def slow():
    with np.load(fixture_path("shifted_calibration.npz")) as arrays:
        x = arrays["x"].astype(np.float32)
    for start in range(0, len(x), 10):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        yield x[start:start + 10]
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_command_goes_on_where_it_was_stopped(
    how: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(LOADER)
    model = str(fixture_path("digits_bn.onnx"))

    def command(*words: str) -> list[str]:
        return [sys.executable, "-c", MAIN, "recalibrate", model, "--data", "mine:slow", "--method", "ema", *words]

    monkeypatch.setenv("PAUSE", "0.2")
    with subprocess.Popen(
        command("-o", "out.onnx"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        stopped(run, Path("out.onnx.partial"), how)
    assert not Path("out.onnx").exists()
    monkeypatch.setenv("PAUSE", "0")
    for words in (("-o", "out.onnx", "--resume"), ("-o", "whole.onnx")):
        subprocess.run(command(*words), check=True, capture_output=True, timeout=100)
    assert not Path("out.onnx.partial").exists()
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
