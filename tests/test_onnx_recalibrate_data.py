"""Recalibrating ONNX models: data that are bad, too few, or do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bnctl.data.batches import Batch, Batches, as_batches
from bnctl.engines.onnx import recalibrate as engine
from bnctl.engines.onnx.recalibration import workbench
from bnctl.errors import DataError, UsageError
from onnx_recalibration import (
    Reference,
    bits,
    data,
    error,
    left,
    plain,
    recalibrate,
    residual,
    split,
    statistics_of,
)
from test_onnx_checks import FREE, Net

# Data


def test_nan_and_infinity_are_named() -> None:
    model, x = plain().model("y"), data(6, 3, 8, 8)
    x[5, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="batch 1: input x holds NaN or infinity") as caught:
        recalibrate(model, split(x, 3, 3))
    assert caught.value.hint
    net = Net(FREE, 3, 8, 8)
    net.bn(net.add("Mul", "x", np.array(1e10)), 3, out="y")
    x = data(6, 3, 8, 8)
    x[5] *= 1e30
    for method in ("exact", "batch"):
        with pytest.raises(DataError, match="batch 1: the input of n_y holds NaN or infinity") as caught:
            recalibrate(net.model("y"), split(x, 3, 3), method=method)
        assert caught.value.hint


@pytest.mark.parametrize("how", [{}, {"memory_bytes": 0}, {"method": "batch"}, {"method": "ema"}])
def test_bad_batches_are_left_out_where_that_is_asked_for(how: dict[str, Any]) -> None:
    model, x = residual().model("y"), data(12, 3, 8, 8)
    x[4, 0, 0, 0] = np.inf
    found = engine.recalibrate(model, split(x, 3, 3, 3, 3), on_bad_batch="skip", **how)
    assert found.skipped == [1]
    assert found.samples == 9
    without = np.concatenate([x[:3], x[6:]])
    assert bits(found.model) == bits(recalibrate(model, split(without, 3, 3, 3), **how)[0])
    with pytest.raises(DataError, match="every batch holds NaN"):
        engine.recalibrate(model, split(x[3:6], 3), on_bad_batch="skip", **how)


def test_what_was_not_measured_has_no_self_consistency() -> None:
    """The one batch that would have shown it was left out."""
    model, x = residual().model("y"), data(40, 3, 8, 8)
    batches = split(x, *[4] * 10)
    measured = engine.recalibrate(model, batches, method="batch").sites
    assert all(site.self_consistency is not None for site in measured)
    x[0, 0, 0, 0] = np.nan
    left_out = engine.recalibrate(model, batches, method="batch", on_bad_batch="skip").sites
    assert all(site.self_consistency is None for site in left_out)


def test_until_goes_on_where_all_that_it_took_was_bad() -> None:
    batches = split(data(600, 3, 8, 8), *[8] * 75)
    for batch in batches[::9]:  # 75 // 8
        batch.args[0][0, 0, 0, 0] = np.nan
    found = engine.recalibrate(plain().model("y"), batches, until=0.08, on_bad_batch="skip")
    assert found.enough
    assert found.samples > 64


# Enough data


@pytest.mark.parametrize("how", [{}, {"memory_bytes": 0}, {"method": "batch"}, {"method": "ema"}])
def test_until_stops_when_the_data_are_enough(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced batches are taken, so that sorted data do not mislead."""
    model, x = plain().model("y"), data(1200, 3, 8, 8)
    x = x[x.mean((1, 2, 3)).argsort()]
    batches = as_batches(split(x, *[8] * 150))
    strides, start_over = [], workbench.Workbench.start_over

    def noting(bench: workbench.Workbench, count: int | None) -> None:
        start_over(bench, count)
        strides.append(bench.stride)

    monkeypatch.setattr(workbench.Workbench, "start_over", noting)
    found = engine.recalibrate(model, batches, until=0.03, **how)
    assert found.enough
    assert 64 < found.samples < 1200
    assert found.standard_error <= 0.03
    taken = [batch for _, batch in batches.every(0, strides[-1])]
    assert len(taken) == found.samples // 8
    same = engine.recalibrate(model, taken, **how)
    assert bits(same.model) == bits(found.model)
    assert same.standard_error == found.standard_error
    assert engine.recalibrate(model, taken[::2], **how).standard_error > 0.03


def test_until_says_when_the_data_are_too_few() -> None:
    found = engine.recalibrate(plain().model("y"), split(data(100, 3, 8, 8), *[8] * 12, 4), until=1e-3)
    assert found.enough is False
    assert found.samples == 100


def test_until_on_data_of_unknown_length() -> None:
    batches = split(data(1200, 3, 8, 8), *[8] * 150)
    unknown = Batches(lambda first, step: islice(enumerate(batches), first, None, step))
    found = engine.recalibrate(plain().model("y"), unknown, until=0.08)
    assert found.enough
    assert found.samples < 1200
    same = recalibrate(plain().model("y"), batches[: found.samples // 8])
    assert bits(same[0]) == bits(found.model)


@pytest.mark.parametrize("until", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_tolerances(until: float) -> None:
    with pytest.raises(UsageError, match="tolerance of the means"):
        recalibrate(plain().model("y"), split(data(4, 3, 8, 8), 4), until=until)


def test_no_data() -> None:
    for method in ("exact", "batch"):
        with pytest.raises(DataError, match="holds no samples"):
            recalibrate(plain().model("y"), [], method=method)


def test_data_that_end_early_in_a_later_pass() -> None:
    batches = split(data(6, 3, 8, 8), 3, 3)
    with pytest.raises(DataError, match="holds no samples"):
        recalibrate(plain().model("y"), Draining(batches), memory_bytes=0)
    recalibrate(plain().model("y"), Draining(batches), memory_bytes=10**9)


class Draining:
    """Gives everything once, and an empty batch afterwards."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        batches, self.batches = self.batches, split(data(0, 3, 8, 8), 0)
        return iter(batches)


def test_a_batch_that_does_not_fit() -> None:
    with pytest.raises(DataError, match=r"batch 1: .*'x' expects x: float32 \[None, 3, 8, 8\]"):
        recalibrate(plain().model("y"), [*split(data(2, 3, 8, 8), 2), *split(data(2, 3, 8, 9), 2)])
    net = Net(FREE, 3, "H", "W")
    net.bn(net.add("Reshape", "x", np.array([-1, 3, 8, 8])), 3, out="y")
    with pytest.raises(DataError, match="batch 0 does not run through the model"):
        recalibrate(net.model("y"), split(data(1, 3, 8, 9), 1))


def test_one_value_per_channel() -> None:
    net = Net(FREE, 3, 8, 8)
    net.bn(net.add("GlobalAveragePool", "x"), 3, out="y")
    proto, x = net.proto("y"), data(3, 3, 8, 8)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 1, 1, 1))
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5
    with pytest.raises(DataError, match="batch 1: n_y sees one value per channel"):
        recalibrate(net.model("y"), split(x, 2, 1), method="batch")


def test_sites_to_which_nothing_comes_are_left() -> None:
    net = Net(FREE, 3, 8, 8)
    net.bn(net.add("Slice", net.bn("x", 3, out="a"), np.array([0]), np.array([0]), np.array([2])), 3, out="y")
    left(net, net.model("y"), data(3, 3, 8, 8), "BN302", "empty")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "running"}, "'running'"),
        ({"prior": -1.0}, "prior is -1"),
        ({"prior": float("nan")}, "prior is nan"),
        ({"prior": 2.0, "method": "ema"}, "no prior"),
    ],
)
def test_usage(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        recalibrate(plain().model("y"), split(data(2, 3, 8, 8), 2), **options)
    assert caught.value.hint


def test_torch_is_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(plain().proto("y"), path)
    code = f"""
import sys
import numpy as np, onnx_ir
from bnctl.data.batches import Batch
from bnctl.engines.onnx.recalibrate import recalibrate
for method in ("exact", "batch", "ema"):
    recalibrate(onnx_ir.load({str(path)!r}), [Batch((np.ones((2, 3, 8, 8), np.float32),))], method=method)
assert "onnxruntime" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
