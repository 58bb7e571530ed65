"""Recalibrating ONNX models: statistics against a naive float64 reference, methods, memory, and what is reported."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from bnctl.engines.onnx import recalibrate as engine
from bnctl.engines.onnx.recalibration import schedules, workbench
from bnctl.engines.onnx.recalibration.activations import activation_seen
from bnctl.engines.onnx.recalibration.extract import extracted
from bnctl.numerics.moments import Moments
from bnctl.recalibration.statistics import SiteStatistics
from bnctl.runtime import arena
from onnx_recalibration import (
    OVER_POSITIONS,
    Array,
    Reference,
    bits,
    branches,
    data,
    error,
    over,
    plain,
    recalibrate,
    residual,
    split,
    statistics_of,
)
from test_onnx_checks import FREE, Net, run

NETS = pytest.mark.parametrize("build", [plain, residual, branches])
MEMORY = pytest.mark.parametrize("memory_bytes", [None, 0, 15_000])


@NETS
@MEMORY
@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1), (1,) * 7])
def test_exact_is_the_naive_reference(
    build: Callable[..., Net], sizes: tuple[int, ...], memory_bytes: int | None
) -> None:
    proto, x = build().proto("y"), data(7, 3, 8, 8)
    truth = Reference(proto).exact(x)
    model = ir.from_proto(proto)
    before = bits(model)
    new, sites, samples = recalibrate(model, split(x, *sizes), memory_bytes=memory_bytes)
    assert bits(model) == before
    onnx.checker.check_model(ir.to_proto(new), full_check=True)
    assert samples == 7 and error(statistics_of(new), truth) < 2e-5
    assert {s.action for s in sites} == {"recalibrated"} and {s.calls for s in sites} == {len(sizes)}
    assert max(s.self_consistency for s in sites) < 1e-6
    assert [s.count for s in sites] == [7 * positions for positions in positions_of(new, x)]


def positions_of(model: ir.Model, x: Array) -> list[int]:
    inner = run(model, {"x": x})
    names = [str(n.inputs[0].name) for n in model.graph if n.op_type == "BatchNormalization"]
    return [(inner | {"x": x})[name][0, 0].size for name in names]


@NETS
def test_the_comparison_notices_statistics_of_the_old_activations(build: Callable[..., Net]) -> None:
    """The control: moments gathered in one pass of the model as it is are not what inference will see."""
    proto, x = build().proto("y"), data(7, 3, 8, 8)
    reference = Reference(proto)
    of_old = {node.output[0]: over(reference.input_of(node, x)) for node in reference.nodes}
    assert error(of_old, Reference(proto).exact(x)) > 0.05


@NETS
def test_the_same_bits_from_run_to_run_and_for_any_memory(build: Callable[..., Net]) -> None:
    model, batches = build().model("y"), split(data(7, 3, 8, 8), 3, 3, 1)
    results = [bits(recalibrate(model, batches, memory_bytes=memory)[0]) for memory in (None, None, 0, 15_000)]
    assert len(set(results)) == 1


@pytest.mark.parametrize(("memory_bytes", "times"), [(None, [2, 2, 2]), (0, [2, 4, 6])])
def test_each_activation_is_computed_once_where_it_fits(
    memory_bytes: int | None, times: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[ir.Model] = []

    def recording(*args: Any) -> ir.Model:
        parts.append(extracted(*args))
        return parts[-1]

    runs: Counter[int] = Counter()
    run = workbench.Part.run

    def counting(self: workbench.Part, *given: Any) -> workbench.Feed:
        if self._wanted:
            runs[id(self)] += 1
        return run(self, *given)

    monkeypatch.setattr(workbench, "extracted", recording)
    monkeypatch.setattr(workbench.Part, "run", counting)
    recalibrate(branches().model("y"), split(data(7, 3, 8, 8), 4, 3), memory_bytes=memory_bytes)
    outputs = [str(node.outputs[0].name) for part in parts for node in part.graph if node.op_type == "Conv"]
    assert {outputs.count(name) for name in outputs} == {1}
    assert sorted(runs.values()) == times
    assert len(parts) == 3  # nothing is run for the BN at the input, and the branches' first BNs share a level
    assert not any(node.op_type == "Conv" and node.outputs[0].name == "y" for part in parts for node in part.graph)


@pytest.mark.parametrize(
    ("limit", "parts"),
    [
        (10**9, [(-1, 0), (0, 1), (1, 2), (2, 3)]),
        (6 * 16 * 64 * 4 - 1, [(-1, 0), (0, 1), (0, 2), (2, 3)]),
        (6 * 2 * 64 * 4 - 1, [(-1, 0), (-1, 1), (-1, 2), (2, 3)]),
        (6 * 2 * 4 * 4 - 1, [(-1, 0), (-1, 1), (-1, 2), (-1, 3)]),
    ],
)
def test_a_level_starts_from_the_last_border_that_fits(
    limit: int, parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held of six samples: (2, 8, 8) behind the first level, (16, 8, 8) behind the second, (2, 2, 2) behind the third."""
    net = Net(FREE, 3, 8, 8)
    v = net.bn(net.conv("x", 3, 2, 1), 2, out="a")
    v = net.bn(net.conv(v, 2, 16, 1), 16, out="b")
    v = net.add("MaxPool", net.conv(v, 16, 2, 1), kernel_shape=[4, 4], strides=[4, 4])
    v = net.bn(v, 2, out="c")
    net.bn(net.conv(v, 2, 4, 1), 4, out="y")
    proto, x = net.proto("y"), data(6, 3, 8, 8)
    opened: list[tuple[int, int]] = []
    original = schedules._advance

    def recording(bench: Any, border: Any, parts: Any, level: int, *given: Any) -> Any:
        opened.append((border.level, level))
        return original(bench, border, parts, level, *given)

    monkeypatch.setattr(schedules, "_advance", recording)
    messages: list[tuple[str, int, int | None]] = []
    new, _, _ = recalibrate(
        ir.from_proto(proto), split(x, 2, 2, 2), memory_bytes=limit, progress=lambda *words: messages.append(words)
    )
    assert opened == parts
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5
    assert messages == [("settle", n, 4) for n in (1, 2, 3, 4)]


# Methods


def test_batch_pools_what_own_statistics_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine, schedules):
        monkeypatch.setattr(module, "PROBE", 1)  # what the statistics produce is measured on all batches
    proto, x = residual().proto("y"), data(7, 3, 8, 8)
    seen = Reference(proto).per_batch([x[:4], x[4:]])
    truth = {name: over(np.concatenate(parts)) for name, parts in seen.items()}
    new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 4, 3), method="batch")
    assert error(statistics_of(new), truth) < 2e-5
    assert error(truth, Reference(proto).exact(x)) > 1e-3, "the control: another method gives something else"
    inference = Reference(ir.to_proto(new))
    for site, node in zip(sites, inference.nodes, strict=True):
        produced = over(inference.input_of(node, x))
        expected = error({"": statistics_of(new)[node.output[0]]}, {"": produced})
        assert site.self_consistency == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(s.self_consistency for s in sites) > 1e-3


@pytest.mark.parametrize(("size", "certain"), [(16, False), (2, True)])
def test_a_part_of_the_batches_tells_what_is_beyond_chance(
    size: int, certain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch in four is run again: what their choice may do is none of the method's fault, what small batches do is."""
    net, x = (plain(), data(1024, 3, 8, 8)) if certain else (residual(), data(96, 3, 8, 8))
    proto = net.proto("y")
    batches, found = split(x, *[size] * (len(x) // size)), {}
    for probe in (1, 4):
        for module in (engine, schedules):
            monkeypatch.setattr(module, "PROBE", probe)
        found[probe] = recalibrate(ir.from_proto(proto), batches, method="batch")
    (new, all_, _), (same, some, _) = found[1], found[4]
    assert bits(new) == bits(same)
    for one, other in zip(all_, some, strict=True):
        assert other.self_consistency <= one.self_consistency + 1e-6
    assert max(site.self_consistency for site in all_) > 1e-3
    assert (max(site.self_consistency for site in some) > 1e-2) == certain


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_ema_is_what_training_leaves(momentum: float | None) -> None:
    """The operator's momentum is the weight of the old, 0.9 where it is left out."""
    net = plain()
    for node in net.nodes:
        if node.op_type == "BatchNormalization" and momentum is not None:
            node.attribute.append(helper.make_attribute("momentum", momentum))
    proto, x = net.proto("y"), data(7, 3, 8, 8)
    reference = Reference(proto)
    old = {node.output[0]: reference.stored(node) for node in reference.nodes}
    keep = 0.9 if momentum is None else momentum
    truth = {}
    for name, parts in reference.per_batch([x[:4], x[4:]]).items():
        mean, var = old[name]
        for part in parts:
            n = part[:, 0].size
            new_mean, new_var = over(part)
            mean, var = keep * mean + (1 - keep) * new_mean, keep * var + (1 - keep) * new_var * n / (n - 1)
        truth[name] = mean, var
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 4, 3), method="ema")
    assert error(statistics_of(new), truth) < 2e-5
    swapped, _, _ = recalibrate(ir.from_proto(proto), split(x[::-1], 3, 4), method="ema")
    assert error(statistics_of(swapped), truth) > 1e-3, "the control: the order of batches matters"


@MEMORY
def test_prior_mixes_the_old_statistics_in_and_later_layers_see_that(memory_bytes: int | None) -> None:
    proto, x = residual().proto("y"), data(7, 3, 8, 8)
    truth = Reference(proto).exact(x, prior=5.0)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 4, 3), prior=5.0, memory_bytes=memory_bytes)
    assert error(statistics_of(new), truth) < 2e-5
    assert error(truth, Reference(proto).exact(x)) > 1e-2, "the control"


def test_what_is_reported() -> None:
    proto, x = plain().proto("y"), data(40, 3, 8, 8)
    new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 30, 10))
    seen = Reference(ir.to_proto(new))
    for site, node in zip(sites, seen.nodes, strict=True):
        values = seen.input_of(node, x)
        of_samples, deviation = values.mean((2, 3)), values.std(OVER_POSITIONS)
        expected = of_samples.std(0, ddof=1) / np.sqrt(len(x)) / np.where(deviation > 0, deviation, np.inf)
        assert site.standard_error == pytest.approx(expected.max(), rel=1e-4)
        assert site.channels == values.shape[1] and site.drift.max > 0
    assert [s.name for s in sites] == ["n_a", "n_b", "n_c"]
    assert isinstance(sites[0], SiteStatistics)


def test_dead_channels() -> None:
    net = Net(FREE, 3, 4, 4)
    weight = net.normal(4, 3, 1, 1)
    weight[:2] = 0
    net.bn(net.add("Conv", "x", weight), 4, out="y")
    _, sites, _ = recalibrate(net.model("y"), split(data(4, 3, 4, 4), 4))
    assert sites[0].dead_channels == 2


# Moments of an activation


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3, 4, 6), 1), ((5, 4, 6, 3), 3), ((6, 3), 1), ((4, 7, 3), 2)])
@pytest.mark.parametrize("chunk", [1, 10, 10**6])
def test_moments_of_an_activation(shape: tuple[int, ...], axis: int, dtype: Any, chunk: int) -> None:
    x = np.random.default_rng(0).normal(100, 0.1, shape).astype(dtype)
    seen = activation_seen(x, axis, chunk_elements=chunk)
    whole = Moments.of(x, axis)
    assert seen.values.count == whole.count and seen.samples.count == shape[0]
    np.testing.assert_allclose(seen.values.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(seen.values.m2, whole.m2, rtol=1e-9)
    means = np.moveaxis(x, axis, 1).astype(np.float64).reshape(shape[0], 3, -1).mean(2)
    np.testing.assert_allclose(seen.samples.variance(), means.var(0), rtol=1e-8, atol=1e-20)


def test_moments_of_nothing() -> None:
    for shape in ((0, 3, 4), (2, 3, 0)):
        seen = activation_seen(np.zeros(shape, np.float32))
        assert seen.values.count == seen.samples.count == 0 and seen.values.mean.shape == (3,)


# Memory


def resident_bytes() -> int:
    path = Path("/proc/self/statm")
    if not path.exists():
        pytest.skip("this system does not say how much memory a process has")
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed, and was kept for the next one who asks
    return int(path.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("gives_back", [True, False])
def test_the_arena_is_emptied(gives_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not gives_back:  # the control
        monkeypatch.setattr(arena, "_give_back", lambda: None)
    model = plain().model("y")
    recalibrate(model, split(data(4, 3, 8, 8), 4))
    before = resident_bytes()
    net = Net(FREE, 1, "H", "W")
    net.bn(net.add("Relu", net.bn(net.conv("x", 1, 64, 1), 64, out="a")), 64, out="y")
    recalibrate(net.model("y"), split(data(2, 1, 384, 384), 1, 1))  # 2 x 36 MiB
    assert (resident_bytes() - before < 2**25) == gives_back
    monkeypatch.undo()
    with arena.shared_arena():
        pass
    assert resident_bytes() - before < 2**25


def test_ema_leaves_what_training_would_not_move() -> None:
    """A BatchNorm of torch without momentum is exported with 1, the weight of the old."""
    net = plain()
    for node in net.nodes:
        if node.op_type == "BatchNormalization" and node.name == "n_b":
            node.attribute.append(onnx.helper.make_attribute("momentum", 1.0))
    model, batches = net.model("y"), split(data(6, 3, 8, 8), 3, 3)
    before = statistics_of(model)["b"]
    new, sites, _ = recalibrate(model, batches, method="ema")
    assert {s.name: s.code for s in sites} == {"n_a": None, "n_b": "BN303", "n_c": None}
    np.testing.assert_array_equal(statistics_of(new)["b"], before)
    assert all(s.action == "recalibrated" for s in recalibrate(model, batches)[1])
