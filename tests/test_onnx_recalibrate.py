"""Recalibrating ONNX models: statistics against a naive float64 reference, one pass per BatchNormalization."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bnctl.data.batches import Batch, Batches, as_batches
from bnctl.engines.onnx import recalibrate as engine
from bnctl.engines.onnx.recalibration import schedules, workbench
from bnctl.engines.onnx.recalibration.activations import activation_seen
from bnctl.engines.onnx.recalibration.extract import extracted
from bnctl.errors import DataError, ModelError, UsageError
from bnctl.numerics.moments import Moments
from bnctl.recalibration.statistics import SiteStatistics
from bnctl.runtime import arena
from test_onnx_checks import FREE, Net, count, run

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
Array = NDArray[Any]
Statistics = tuple[Array, Array]
OVER_POSITIONS = (0, 2, 3)


def recalibrate(*given: Any, **how: Any) -> tuple[ir.Model, list[SiteStatistics], int]:
    found = engine.recalibrate(*given, **how)
    return found.model, found.sites, found.samples


# The reference: float64, no engine of ours, everything in memory, the statistics of one node per pass.


class Reference:
    """A model in float64 in which each BatchNormalization has statistics of its own."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = copy.deepcopy(proto)
        graph = self.proto.graph
        for tensor in graph.initializer:
            if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
        for value in graph.input:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
        for opset in self.proto.opset_import:
            opset.version = max(opset.version, 9)  # onnx.reference fails on BatchNormalization before that
        arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.nodes = [n for n in graph.node if n.op_type == "BatchNormalization"]
        for node in self.nodes:
            self.store(node, (arrays[node.input[3]], arrays[node.input[4]]))

    def store(self, node: onnx.NodeProto, statistics: Statistics) -> None:
        for index, array in zip((3, 4), statistics, strict=True):
            name = f"{node.output[0]}/{index}"
            known = [t for t in self.proto.graph.initializer if t.name == name]
            tensor = known[0] if known else self.proto.graph.initializer.add()
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            node.input[index] = name

    def stored(self, node: onnx.NodeProto) -> Statistics:
        arrays = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}
        return arrays[node.input[3]], arrays[node.input[4]]

    def input_of(self, node: onnx.NodeProto, x: Array) -> Array:
        name = node.input[0]
        if name == "x":
            return x.astype(np.float64)
        evaluator = copy.deepcopy(self.proto)
        del evaluator.graph.output[:]
        evaluator.graph.output.append(onnx.ValueInfoProto(name=name))
        return ReferenceEvaluator(evaluator).run(None, {"x": x.astype(np.float64)})[0]

    def exact(self, x: Array, prior: float = 0.0) -> dict[str, Statistics]:
        found = {}
        for node in self.nodes:
            seen = self.input_of(node, x)
            new = over(seen)
            if prior:
                w, old = prior / (prior + len(x)), self.stored(node)
                new = (
                    w * old[0] + (1 - w) * new[0],
                    w * old[1] + (1 - w) * new[1] + w * (1 - w) * (old[0] - new[0]) ** 2,
                )
            self.store(node, new)
            found[node.output[0]] = new
        return found

    def per_batch(self, batches: list[Array]) -> dict[str, list[Array]]:
        """What each node sees of each batch, when all before it normalise with the statistics of the batch."""
        found: dict[str, list[Array]] = {node.output[0]: [] for node in self.nodes}
        for batch in batches:
            for node in self.nodes:
                seen = self.input_of(node, batch)
                found[node.output[0]].append(seen)
                self.store(node, over(seen))
        return found


def over(x: Array) -> Statistics:
    x = np.asarray(x, np.float64)
    axes = tuple(a for a in range(x.ndim) if a != 1)
    return x.mean(axes), x.var(axes)


def statistics_of(model: ir.Model) -> dict[str, Statistics]:
    found = {}
    for node in model.graph:
        if node.op_type == "BatchNormalization":
            tensors = [v.const_value for v in node.inputs[3:5]]
            found[str(node.outputs[0].name)] = tuple(t.numpy().astype(np.float64) for t in tensors)
    return found


def error(found: dict[str, Statistics], truth: dict[str, Statistics]) -> float:
    """The largest difference, of means in standard deviations and of variances relative to themselves."""
    assert found.keys() == truth.keys()
    worst = 0.0
    for name, (mean, var) in truth.items():
        scale = var + 1e-5
        worst = max(
            worst, np.max(np.abs(found[name][0] - mean) / np.sqrt(scale)), np.max(np.abs(found[name][1] - var) / scale)
        )
    return float(worst)


def bits(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def data(samples: int, *shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 1, (samples, *shape)) * rng.uniform(0.5, 2, (samples, *[1] * len(shape))) + 0.3).astype(
        np.float32
    )


def split(x: Array, *sizes: int) -> list[Batch]:
    assert sum(sizes) == len(x)
    return [Batch((part,)) for part in np.split(x, np.cumsum(sizes)[:-1])]


def plain(**options: Any) -> Net:
    net = Net(FREE, 3, 8, 8, **options)
    v = net.add("Relu", net.bn(net.conv("x", 3, 4), 4, out="a"))
    v = net.add("Relu", net.bn(net.conv(v, 4, 6, bias=False), 6, out="b"))
    net.add("Conv", net.bn(v, 6, out="c"), net.normal(2, 6, 1, 1), out="y")
    return net


def residual(**options: Any) -> Net:
    net = Net(FREE, 3, 8, 8, **options)
    v = net.add("Relu", net.bn(net.conv("x", 3, 4), 4, out="a"))
    w = net.bn(net.conv(v, 4, 4, pads=[1, 1, 1, 1]), 4, out="b")
    w = net.bn(net.conv(net.add("Relu", w), 4, 4, pads=[1, 1, 1, 1]), 4, out="c")
    net.add("GlobalAveragePool", net.bn(net.add("Relu", net.add("Add", v, w)), 4, out="d"), out="y")
    return net


def branches(**options: Any) -> Net:
    """BN at the very input, two branches of different depth, and a concatenation."""
    net = Net(FREE, 3, 8, 8, **options)
    x = net.bn("x", 3, out="a")
    one = net.add("Relu", net.bn(net.conv(x, 3, 4, 1), 4, out="b"))
    two = net.bn(net.conv(net.add("Relu", net.bn(net.conv(x, 3, 2, 1), 2, out="c")), 2, 3, 1), 3, out="d")
    net.add("Conv", net.bn(net.add("Concat", one, two, x, axis=1), 10, out="e"), net.normal(2, 10, 1, 1), out="y")
    return net


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


@pytest.mark.parametrize(("memory_bytes", "times"), [(None, {1}), (0, {2, 3})])
def test_each_activation_is_computed_once_where_it_fits(
    memory_bytes: int | None, times: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[ir.Model] = []

    def recording(*args: Any) -> ir.Model:
        parts.append(extracted(*args))
        return parts[-1]

    monkeypatch.setattr(workbench, "extracted", recording)
    recalibrate(branches().model("y"), split(data(7, 3, 8, 8), 4, 3), memory_bytes=memory_bytes)
    outputs = [str(node.outputs[0].name) for part in parts for node in part.graph if node.op_type == "Conv"]
    assert {outputs.count(name) for name in outputs} == times
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
    original = schedules.Part

    def recording(bench: Any, start: int, end: int) -> Any:
        opened.append((start, end))
        return original(bench, start, end)

    monkeypatch.setattr(schedules, "Part", recording)
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


# Forms of files


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 17, 21, 23])
def test_opsets(opset: int) -> None:
    net = residual(opset=opset, ir_version=3 if opset < 9 else 8)
    proto, x = net.proto("y"), data(5, 3, 8, 8)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    onnx.checker.check_model(ir.to_proto(new), full_check=True)
    assert [v.name for v in new.graph.inputs if not v.is_initializer()] == ["x"]
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


@pytest.mark.parametrize("opset", [13, 17])
def test_half_precision(opset: int) -> None:
    proto, x = residual(opset=opset, dtype=np.float16).proto("y"), data(5, 3, 8, 8)
    new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    assert {t.dtype for n in new.graph if n.op_type == "BatchNormalization" for t in n.inputs[3:]} == {
        ir.DataType.FLOAT16
    }
    assert 1e-6 < error(statistics_of(new), Reference(proto).exact(x)) < 2e-2
    assert max(s.self_consistency for s in sites) < 2e-3


def test_statistics_that_do_not_fit_half_precision() -> None:
    net = Net(FREE, 2, 2, dtype=np.float16)
    net.bn("x", 2, out="y")
    x = np.full((2, 2, 2), 60000, np.float16) * np.array([1, -1], np.float16)
    with pytest.raises(ModelError, match="n_y: the new statistics do not fit float16") as caught:
        recalibrate(net.model("y"), [Batch((x,))])
    assert caught.value.hint


def test_nodes_that_share_statistics_get_their_own() -> None:
    net = Net(FREE, 4, 6, 6)
    stats = net.statistics(4)
    v = net.add("BatchNormalization", net.conv("x", 4, 4), *stats, out="a")
    v = net.add("BatchNormalization", net.conv(net.add("Relu", v), 4, 4), *stats, out="b")
    net.add("BatchNormalization", net.add("Relu", v), *stats, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    model = ir.from_proto(proto)
    new, _, _ = recalibrate(model, split(x, 3, 2))
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5
    some, sites, _ = recalibrate(model, split(x, 3, 2), skip="n_y")
    assert [s.code for s in sites] == [None, None, "BN301"]
    mean = next(n for n in some.graph if n.outputs[0].name == "y").inputs[3]
    assert mean.name == stats[2] and np.array_equal(mean.const_value.numpy(), net.initializers[stats[2]])


def test_one_tensor_as_mean_and_variance() -> None:
    net = Net(FREE, 4, 6, 6)
    ones = net.param(np.ones(4))
    net.add("BatchNormalization", net.conv("x", 4, 4), ones, ones, ones, ones, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 5))
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5
    node = next(n for n in new.graph if n.outputs[0].name == "y")
    assert [v.name for v in node.inputs[1:3]] == [ones, ones]


def test_names_stay_where_nobody_else_has_them() -> None:
    model = plain().model("y")
    new, _, _ = recalibrate(model, split(data(4, 3, 8, 8), 4))
    assert [[v.name for v in n.inputs] for n in new.graph] == [[v.name for v in n.inputs] for n in model.graph]
    assert new.graph.initializers["p0"].const_value is model.graph.initializers["p0"].const_value


def test_statistics_in_constant_nodes() -> None:
    """As Paddle writes them."""
    proto, x = residual().proto("y"), data(5, 3, 8, 8)
    truth = Reference(proto).exact(x)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes = [*constants, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    onnx.checker.check_model(ir.to_proto(new), full_check=True)
    assert error(statistics_of(new), truth) < 2e-5
    assert count(new, "Constant") == len(constants) - 8 and len(new.graph.initializers) == 8


def test_external_data(tmp_path: Path) -> None:
    proto, x = residual().proto("y"), data(5, 3, 8, 8)
    truth = Reference(proto).exact(x)
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    new, _, _ = recalibrate(ir.load(tmp_path / "net.onnx"), split(x, 3, 2))
    assert error(statistics_of(new), truth) < 2e-5


def test_a_local_function_is_put_in_place_of_its_calls() -> None:
    net = Net(FREE, 4, 6, 6)
    stats = net.statistics(4)
    v = net.conv("x", 4, 4)
    net.nodes.append(helper.make_node("Norm", [v, *stats], ["n"], domain="mine"))
    net.nodes.append(helper.make_node("Norm", ["n", *stats], ["y"], domain="mine"))
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    body = [
        helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["r"]),
        helper.make_node("Relu", ["r"], ["y"]),
    ]
    proto.functions.append(
        helper.make_function("mine", "Norm", ["x", "s", "b", "m", "v"], ["y"], body, [helper.make_opsetid("", 17)])
    )
    new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    assert [s.action for s in sites] == ["recalibrated"] * 2
    assert error(statistics_of(new), Reference(ir.to_proto(new)).exact(x)) < 2e-5


def test_other_functions_stay() -> None:
    net = residual()
    for node in net.nodes:
        if node.op_type == "Relu":
            node.op_type, node.domain = "Act", "mine"
    proto, x = net.proto("y"), data(5, 3, 8, 8)
    body = [helper.make_node("Tanh", ["x"], ["t"]), helper.make_node("Add", ["x", "t"], ["y"])]
    proto.functions.append(helper.make_function("mine", "Act", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2))
    assert [f.name for f in new.functions.values()] == ["Act"]
    assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


def test_a_norm_of_something_that_is_no_data() -> None:
    net = Net(FREE, 4, 4, 4)
    side = net.bn(net.add("Relu", net.normal(1, 4, 4, 4)), 4, out="b")
    net.bn(net.add("Add", net.bn("x", 4, out="a"), side), 4, out="y")
    proto, x = net.proto("y"), data(5, 4, 4, 4)
    for memory in (None, 0):
        new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2), memory_bytes=memory)
        assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


# What is left, and why


def left(net: Net, model: ir.Model, x: Array, code: str, words: str) -> None:
    """One more BN in front is recalibrated; the one called `y` stays as it is, with a reason."""
    before = {v.name: v.const_value for v in model.graph.initializers.values()}
    new, sites, _ = recalibrate(model, split(x, len(x)))
    assert {s.name: s.code for s in sites} == {"n_a": None, "n_y": code}
    reason = next(s.reason for s in sites if s.code)
    assert words in str(reason)
    moved = {
        name
        for name, tensor in before.items()
        if new.graph.initializers.get(name) is None or new.graph.initializers[name].const_value is not tensor
    }
    assert moved == set(net.nodes[0].input[3:])


def test_overridable_statistics_are_left() -> None:
    net = Net(FREE, 4, 6, 6)
    net.bn(net.bn("x", 4, out="a"), 4, out="y")
    mean = net.nodes[-1].input[3]
    net.inputs.append(helper.make_tensor_value_info(mean, TensorProto.FLOAT, [4]))
    left(net, net.model("y"), data(3, 4, 6, 6), "BN305", mean)


def test_an_overridable_weight_has_its_default_meanwhile() -> None:
    net = plain()
    proto, x = net.proto("y"), data(5, 3, 8, 8)
    truth = Reference(proto).exact(x)
    net.inputs.append(helper.make_tensor_value_info("p0", TensorProto.FLOAT, [4, 3, 3, 3]))
    new, _, _ = recalibrate(net.model("y"), split(x, 3, 2))
    assert error(statistics_of(new), truth) < 2e-5
    assert [v.name for v in new.graph.inputs] == ["x", "p0"]


def test_statistics_computed_from_data_are_left() -> None:
    net = Net(FREE, 4, 6, 6)
    v = net.bn("x", 4, out="a")
    gamma, beta, _, var = net.statistics(4)
    mean = net.add("ReduceMean", v, axes=[0, 2, 3], keepdims=0)
    net.add("BatchNormalization", v, gamma, beta, mean, var, out="y")
    left(net, net.model("y"), data(3, 4, 6, 6), "BN305", "computed in every run")


@pytest.mark.parametrize(("opset", "outputs", "attributes"), [(17, 3, {"training_mode": 1}), (9, 5, {})])
def test_training_mode_is_left(opset: int, outputs: int, attributes: dict[str, int]) -> None:
    net = Net(FREE, 4, 6, 6, opset=opset)
    v = net.bn("x", 4, out="a")
    net.add("BatchNormalization", v, *net.statistics(4), out="y", outputs=outputs, **attributes)
    left(net, net.model("y"), data(3, 4, 6, 6), "BN304", "training mode")


def test_statistics_per_position_are_left() -> None:
    net = Net(FREE, 4, 6, opset=7, ir_version=3)
    v = net.bn("x", 4, out="a")
    arrays = [net.param(a) for a in (net.normal(4, 6), net.normal(4, 6), net.normal(4, 6), np.ones((4, 6)))]
    net.add("BatchNormalization", v, *arrays, out="y", spatial=0)
    left(net, net.model("y"), data(3, 4, 6), "BN308", "positions")


def test_the_body_of_an_if_is_left() -> None:
    net = Net(FREE, 4, 6, 6)
    v, flag = net.bn("x", 4, out="a"), net.param(np.array(True))
    inner = Net(FREE, 4, 6, 6)
    gamma, beta, mean, var = net.statistics(4)
    inner.nodes.append(helper.make_node("BatchNormalization", [v, gamma, beta, mean, var], ["inner"], name="n_y"))
    shape = [FREE, 4, 6, 6]
    out = [helper.make_tensor_value_info("inner", TensorProto.FLOAT, shape)]
    other = [helper.make_tensor_value_info("other", TensorProto.FLOAT, shape)]
    bodies = {
        "then_branch": helper.make_graph(inner.nodes, "then", [], out),
        "else_branch": helper.make_graph([helper.make_node("Relu", [v], ["other"])], "else", [], other),
    }
    net.nodes.append(helper.make_node("If", [flag], ["y"], name="n_if", **bodies))
    left(net, net.model("y"), data(3, 4, 6, 6), "BN308", "inside a node")


def test_a_site_behind_an_if_that_reads_a_held_value() -> None:
    """What a body captures is carried over the border between two levels like any input."""
    net = Net(FREE, 4, 6, 6)
    skip = net.add("Relu", net.conv("x", 4, 4))
    v = net.bn(net.conv("x", 4, 4), 4, out="a")
    shape = [FREE, 4, 4, 4]
    branches_ = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, [v, skip], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        )
        for name, op in (("then", "Add"), ("else", "Sub"))
    }
    net.nodes.append(helper.make_node("If", [net.param(np.array(True))], ["chosen"], name="n_if", **branches_))
    net.bn("chosen", 4, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    for memory in (None, 0):
        new, sites, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2), memory_bytes=memory)
        assert [s.action for s in sites] == ["recalibrated"] * 2
        assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


def test_a_sequence_is_held_between_levels() -> None:
    net = Net(FREE, 4, 6, 6)
    pair = net.add("SequenceConstruct", "x", net.add("Relu", "x"))
    v = net.bn(net.conv("x", 4, 4, 1), 4, out="a")
    net.bn(net.add("Concat", v, net.add("ConcatFromSequence", pair, axis=1), axis=1), 12, out="y")
    proto, x = net.proto("y"), data(5, 4, 6, 6)
    for memory in (None, 0):
        new, _, _ = recalibrate(ir.from_proto(proto), split(x, 3, 2), memory_bytes=memory)
        assert error(statistics_of(new), Reference(proto).exact(x)) < 2e-5


def test_a_norm_of_a_constant_is_left() -> None:
    net = Net(FREE, 4, 4, 4)
    v = net.bn("x", 4, out="a")
    net.nodes.append(
        helper.make_node(
            "BatchNormalization", [net.param(net.normal(1, 4, 4, 4)), *net.statistics(4)], ["c"], name="n_y"
        )
    )
    net.add("Add", v, "c", out="z")
    left(net, net.model("z"), data(3, 4, 4, 4), "BN308", "constant")


def test_globs() -> None:
    model, batches = plain().model("y"), split(data(4, 3, 8, 8), 4)
    _, sites, _ = recalibrate(model, batches, where=["n_a", "n_b"], skip="*b")
    assert [(s.name, s.code) for s in sites] == [("n_a", None), ("n_b", "BN301"), ("n_c", "BN301")]
    with pytest.raises(UsageError, match="no layer matches 'typo'"):
        recalibrate(model, batches, where="typo")


def test_a_folded_model_is_refused() -> None:
    net = Net(FREE, 3, 8, 8)
    net.add("Relu", net.conv("x", 3, 4), out="y")
    with pytest.raises(ModelError, match=r"^net\.onnx has no normalisation with running statistics$") as caught:
        recalibrate(net.model("y"), split(data(4, 3, 8, 8), 4), name="net.onnx")
    assert "bnctl insert" in str(caught.value.hint)
    net = Net(FREE, 3, 8, 8)
    net.add("Add", net.add("Mul", net.conv("x", 3, 4), net.normal(4, 1, 1)), net.normal(4, 1, 1), out="y")
    with pytest.raises(ModelError, match="in 1 affines per channel, they may be merged"):
        recalibrate(net.model("y"), split(data(4, 3, 8, 8), 4))


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


# BatchNormalization written out


class Written(Net):
    """A net whose normalisations are written out in some way, or not at all ("node")."""

    def __init__(self, form: str, *shape: int | str, rank: int = 4, **options: Any) -> None:
        super().__init__(*shape, **options)
        self.form, self.rank = form, rank

    def constant(self, array: Array, name: str) -> str:
        """One value per channel, on axis 1."""
        shape = (1,) * (self.rank % 2) + array.shape + (1, 1)
        return self.param(array.reshape(shape), name)

    def norm(self, x: str, channels: int, name: str) -> str:
        gamma, beta, mean, var = (self.initializers.pop(p) for p in self.statistics(channels))
        if self.form == "node":
            arrays = zip(("gamma", "beta", "mean", "var"), (gamma, beta, mean, var), strict=True)
            return self.add("BatchNormalization", x, *(self.param(a, f"{name}.{n}") for n, a in arrays), out=name)
        eps = self.param(np.array(1e-5)) if "p_eps" not in self.initializers else "p_eps"
        g, b, m = (self.constant(a, f"{name}.{n}") for n, a in (("gamma", gamma), ("beta", beta), ("mean", mean)))
        if self.form.startswith("stored"):
            deviation = np.sqrt(var.astype(np.float64) + 1e-5)
            std = self.form != "stored reciprocal"
            spread = "Div" if std else "Mul", self.constant(deviation if std else 1 / deviation, f"{name}.var")
            steps = (("Mul", g), spread) if self.form == "stored deviation, gamma first" else (spread, ("Mul", g))
            return self.then(x, ("Sub", m), *steps, ("Add", b), out=name)
        if self.form == "unsqueezed":  # as torch decomposes it: (x - mean) * (1 / sqrt(var + eps)) * weight + bias
            del self.initializers[f"{name}.mean"]
            v = self.param(var, f"{name}.var")
            m = self.unsqueezed(self.param(mean, f"{name}.mean"))
            inverse = self.unsqueezed(self.add("Reciprocal", self.add("Sqrt", self.add("Add", v, eps))))
            return self.then(x, ("Sub", m), ("Mul", inverse), ("Mul", g), ("Add", b), out=name)
        v = self.constant(var, f"{name}.var")
        if self.form == "power":
            inverse = self.add("Pow", self.add("Add", v, eps), np.array(-0.5))
            return self.then(x, ("Sub", m), ("Mul", inverse), ("Mul", g), ("Add", b), out=name)
        root = self.add("Sqrt", self.add("Add", v, eps))
        match self.form:
            case "divided":
                return self.then(x, ("Sub", m), ("Div", root), ("Mul", g), ("Add", b), out=name)
            case "gamma first":
                return self.then(x, ("Sub", m), ("Mul", g), ("Div", root), ("Add", b), out=name)
            case "one factor":
                return self.then(x, ("Sub", m), ("Mul", self.add("Div", g, root)), ("Add", b), out=name)
            case "negative mean":
                return self.then(x, ("Add", self.add("Neg", m)), ("Div", root), ("Mul", g), ("Add", b), out=name)
            case "scale and shift":  # tf.nn.batch_normalization: x * inv + (beta - mean * inv)
                inverse = self.add("Mul", self.add("Reciprocal", root), g)
                shift = self.add("Sub", b, self.add("Mul", m, inverse))
                return self.add("Add", shift, self.add("Mul", inverse, x), out=name)
        raise AssertionError(self.form)

    def unsqueezed(self, x: str) -> str:
        if self.opset < 13:
            return self.add("Unsqueeze", x, axes=[1, 2])
        return self.add("Unsqueeze", x, np.array([1, 2]))

    def then(self, x: str, *steps: tuple[str, str], out: str) -> str:
        for op, constant in steps[:-1]:
            x = self.add(op, x, constant)
        return self.add(steps[-1][0], x, steps[-1][1], out=out)


FORMS = [
    *("divided", "gamma first", "one factor", "power", "negative mean", "scale and shift", "unsqueezed"),
    *("stored deviation", "stored deviation, gamma first"),
]


def written(form: str, **options: Any) -> Written:
    net = Written(form, FREE, 3, 8, 8, **options)
    v = net.add("Relu", net.norm(net.conv("x", 3, 4), 4, "a"))
    w = net.add("Add", v, net.norm(net.conv(v, 4, 4, pads=[1, 1, 1, 1]), 4, "b"))
    net.norm(net.conv(net.add("Relu", w), 4, 5), 5, "y")
    return net


def output_of(model: ir.Model, x: Array) -> Array:
    return run(model, {"x": x}, inner=False)["y"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("opset", "rank", "memory_bytes"), [(17, 4, None), (9, 5, None), (17, 5, 0)])
def test_written_out(form: str, opset: int, rank: int, memory_bytes: int | None) -> None:
    x = data(7, 3, 8, 8)
    as_node = written("node").model("y")
    expected, expected_sites, _ = recalibrate(as_node, split(x, 4, 3))
    net = written(form, opset=opset, rank=rank)
    model = net.model("y")
    np.testing.assert_allclose(output_of(model, x), output_of(as_node, x), rtol=1e-3, atol=1e-4)
    new, sites, _ = recalibrate(model, split(x, 4, 3), memory_bytes=memory_bytes)
    onnx.checker.check_model(ir.to_proto(new), full_check=True)
    assert [s.action for s in sites] == ["recalibrated"] * 3
    np.testing.assert_allclose(output_of(new, x), output_of(expected, x), rtol=1e-3, atol=1e-4)
    assert np.abs(output_of(new, x) - output_of(model, x)).max() > 0.5, "the control: it is not the old output"
    assert {s.code for s in sites} == {"BN309" if form.startswith("stored") else None}
    for site, other in zip(sites, expected_sites, strict=True):
        assert site.drift.max == pytest.approx(other.drift.max, rel=1e-3)
        assert site.self_consistency < 1e-6 and site.count == other.count
    assert sorted(n.op_type for n in new.graph) == sorted(n.op_type for n in model.graph)
    assert new.graph.initializers.keys() == model.graph.initializers.keys()


def test_a_stored_reciprocal_is_a_factor_like_gamma() -> None:
    """Nothing tells which is which: to guess would be silently wrong where an exporter has them the other way round."""
    with pytest.raises(ModelError, match="BN307"):
        recalibrate(written("stored reciprocal").model("y"), split(data(7, 3, 8, 8), 4, 3))


@pytest.mark.parametrize("form", FORMS)
def test_written_out_in_half_precision(form: str) -> None:
    x = data(7, 3, 8, 8)
    new, sites, _ = recalibrate(written(form, dtype=np.float16).model("y"), split(x, 4, 3))
    assert [s.action for s in sites] == ["recalibrated"] * 3
    arrays = {name: v.const_value.numpy().reshape(-1) for name, v in new.graph.initializers.items()}
    assert {arrays[f"a.{n}"].dtype for n in ("mean", "var")} == {np.dtype(np.float16)}
    mean, _ = Reference(written("node").proto("y")).exact(x)["a"]
    np.testing.assert_allclose(arrays["a.mean"], mean, rtol=1e-2, atol=1e-2)
    assert max(s.self_consistency for s in sites) < 1e-2


def test_written_out_statistics_are_stored_in_their_form() -> None:
    x = data(7, 3, 8, 8)
    truth = Reference(written("node").proto("y")).exact(x)
    for form in FORMS:
        new, _, _ = recalibrate(written(form).model("y"), split(x, 4, 3))
        arrays = {name: v.const_value.numpy().reshape(-1) for name, v in new.graph.initializers.items()}
        for name, (mean, var) in truth.items():
            deviation = np.sqrt(var + 1e-5)
            spread = deviation if form.startswith("stored") else var
            np.testing.assert_allclose(arrays[f"{name}.mean"], mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(arrays[f"{name}.var"], spread, rtol=1e-4, atol=1e-6)


def test_along_the_last_axis() -> None:
    """As Keras writes it for dense layers and channels-last images."""
    net = Net(FREE, 5, 3)
    gamma, beta, mean, var = (net.param(a) for a in (net.normal(4), net.normal(4), net.normal(4), np.ones(4)))
    v = net.add("Sub", net.add("MatMul", "x", net.normal(3, 4)), mean)
    v = net.add("Div", v, net.add("Sqrt", net.add("Add", var, np.array(1e-3))))
    net.add("Add", net.add("Mul", v, gamma), beta, out="y")
    x = data(6, 5, 3)
    new, sites, _ = recalibrate(net.model("y"), split(x, 4, 2))
    seen = x.astype(np.float64) @ net.initializers["p4"].astype(np.float64)
    arrays = {name: v.const_value.numpy() for name, v in new.graph.initializers.items()}
    np.testing.assert_allclose(arrays[mean], seen.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(arrays[var], seen.var((0, 1)), rtol=1e-5)
    assert (sites[0].channels, sites[0].count) == (4, 30)


def test_chains_that_share_constants_get_their_own() -> None:
    """A layer that is called twice: both calls read the same constants, and what is computed from them, and a third reader keeps the old ones."""
    net = Written("divided", FREE, 4, 6, 6)
    gamma, beta, mean, var = (
        net.constant(a, f"c{i}") for i, a in enumerate((*(net.normal(4) for _ in range(3)), np.ones(4)))
    )
    root = net.add("Sqrt", net.add("Add", var, np.array(1e-5)), out="root")
    steps = (("Sub", mean), ("Div", root), ("Mul", gamma), ("Add", beta))
    v = net.then(net.then("x", *steps, out="a"), *steps, out="b")
    net.add("Add", net.add("Relu", v), root, out="y")
    x = data(6, 4, 6, 6)
    model = net.model("y")
    new, sites, _ = recalibrate(model, split(x, 4, 2))
    assert [s.action for s in sites] == ["recalibrated"] * 2
    inner = run(new, {"x": x})
    for name in ("a", "b"):
        y = inner[name].astype(np.float64)
        np.testing.assert_allclose(y.mean(OVER_POSITIONS), net.initializers["c1"].reshape(-1), atol=1e-5)
        np.testing.assert_allclose(y.std(OVER_POSITIONS), np.abs(net.initializers["c0"].reshape(-1)), rtol=1e-3)
    assert np.array_equal(inner["root"], run(model, {"x": x})["root"])
    some, _, _ = recalibrate(model, split(x, 4, 2), where=sites[0].name)
    assert [n.op_type for n in some.graph].count("Sqrt") == 2
    onnx.checker.check_model(ir.to_proto(some), full_check=True)


def not_a_norm(what: str) -> tuple[Net, str | None]:
    """Arithmetic with constants that is none, or of which it cannot be told, behind a BN and a ReLU; and the code it is left with."""
    net = Net(FREE, 4, 4, 4)
    v = net.add("Relu", net.bn("x", 4, out="a"))
    column, row = (net.param(net.rng.uniform(0.5, 2, shape)) for shape in ((4, 1, 1), (4,)))
    column2, column3, sample = (
        net.param(net.rng.uniform(0.5, 2, shape)) for shape in ((4, 1, 1), (4, 1, 1), (1, 4, 4))
    )
    eps = net.param(np.array(1e-5))

    def root(value: str) -> str:
        return net.add("Sqrt", net.add("Add", value, eps))

    def chain(*steps: tuple[str, str]) -> None:
        x = v
        for number, (op, constant) in enumerate(steps, start=1):
            x = net.add(op, x, constant, out="y" if number == len(steps) else None)

    match what:
        case "stored deviation along another axis":
            chain(("Sub", column), ("Div", row), ("Mul", column2), ("Add", column3))
            return net, "BN307"
        case "variance along another axis":
            chain(("Sub", column), ("Div", root(row)))
            return net, "BN307"
        case "statistics per position":
            chain(("Sub", sample), ("Div", root(sample)))
        case "twice the mean":
            chain(("Sub", net.add("Mul", column, np.array(2.0))), ("Div", root(column2)))
            return net, "BN307"
        case "a fourth root":
            chain(("Sub", column), ("Div", net.add("Sqrt", root(column2))))
            return net, "BN307"
        case "mean added":
            chain(("Add", column), ("Div", root(column2)))
            return net, "BN307"
        case "mean subtracted behind the factor":
            chain(("Div", root(column2)), ("Sub", column))
            return net, "BN307"
        case "a negative deviation":
            negative = net.param(-np.ones((4, 1, 1)))
            chain(("Sub", column), ("Mul", negative), ("Mul", column2), ("Add", column3))
            return net, "BN307"
        case "scale and shift":
            chain(("Mul", column), ("Add", column2))
            return net, "BN307"
        case "three constants":
            chain(("Sub", column), ("Div", column2), ("Add", column3))
            return net, "BN307"
        case "another reader between":
            centred = net.add("Sub", v, column, out="between")
            net.add("Add", net.add("Div", centred, root(column2)), centred, out="y")
        case "a term alone":
            chain(("Add", column))
        case "scalars":
            chain(("Sub", net.param(np.array(0.5))), ("Div", root(net.param(np.array(2.0)))))
        case "the affine of another norm":
            net.add(
                "Add",
                net.add("Mul", net.add("InstanceNormalization", v, net.normal(4), net.normal(4)), column),
                column2,
                out="y",
            )
    return net, None


@pytest.mark.parametrize(
    "what",
    [
        "stored deviation along another axis",
        "variance along another axis",
        "statistics per position",
        "twice the mean",
        "a fourth root",
        "mean added",
        "mean subtracted behind the factor",
        "a negative deviation",
        "scale and shift",
        "three constants",
        "another reader between",
        "a term alone",
        "scalars",
        "the affine of another norm",
    ],
)
def test_arithmetic_that_is_no_norm_is_left(what: str) -> None:
    net, code = not_a_norm(what)
    model = net.model("y")
    new, sites, _ = recalibrate(model, split(data(6, 4, 4, 4), 4, 2))
    assert [s.code for s in sites] == [None] + [code] * (code is not None)
    stays = model.graph.initializers.keys() - set(net.nodes[0].input[3:])
    assert all(new.graph.initializers[n].const_value is model.graph.initializers[n].const_value for n in stays)


def test_preprocessing_is_no_norm() -> None:
    net = Net(FREE, 3, 8, 8)
    v = net.add("Div", net.add("Sub", "x", net.normal(3, 1, 1)), net.rng.uniform(0.5, 2, (3, 1, 1)))
    net.bn(net.conv(v, 3, 4), 4, out="y")
    _, sites, _ = recalibrate(net.model("y"), split(data(6, 3, 8, 8), 6))
    assert [s.name for s in sites] == ["n_y"]


# Real models


def test_the_same_as_the_torch_engine() -> None:
    torch = pytest.importorskip("torch")
    import bnctl
    from bnctl.engines.torch.export import to_onnx, to_program
    from nets_resnet20 import BasicBlock

    torch.manual_seed(0)
    stem = (torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    module = torch.nn.Sequential(*stem, BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)).eval()
    batches = split(data(7, 3, 16, 16), 4, 3)
    exported = to_onnx(to_program(module, batches[0]))
    for method in ("exact", "batch", "ema"):
        new, sites, _ = recalibrate(exported, batches, method=method)
        other = bnctl.recalibrate(module, batches, method=method).model.state_dict()
        assert [s.name for s in sites] == ["1", "3.bn1", "3.bn2", "4.bn1", "4.bn2"]
        arrays = {name: v.const_value.numpy() for name, v in new.graph.initializers.items()}
        for site in sites:
            mean, var = (other[f"{site.name}.running_{n}"].numpy() for n in ("mean", "var"))
            np.testing.assert_allclose(arrays[f"{site.name}.running_var"], var, rtol=1e-5)
            scale = np.sqrt(var.max())
            np.testing.assert_allclose(arrays[f"{site.name}.running_mean"], mean, rtol=1e-5, atol=1e-5 * scale)


def test_a_norm_in_custom_torch_code() -> None:
    """The exporter folds sqrt(var + eps) into one constant, as it would for any module that computes BN by hand; of its reciprocal nobody can tell."""
    torch = pytest.importorskip("torch")
    from bnctl.engines.torch.export import to_onnx, to_program

    class Divided(torch.nn.BatchNorm2d):  # type: ignore[name-defined, misc]
        def forward(self, x: Any) -> Any:
            column = (1, -1, 1, 1)
            x = (x - self.running_mean.view(column)) / torch.sqrt(self.running_var.view(column) + self.eps)
            return x * self.weight.view(column) + self.bias.view(column)

    class Multiplied(torch.nn.BatchNorm2d):  # type: ignore[name-defined, misc]
        def forward(self, x: Any) -> Any:
            column = (1, -1, 1, 1)
            x = (x - self.running_mean.view(column)) * torch.rsqrt(self.running_var.view(column) + self.eps)
            return x * self.weight.view(column) + self.bias.view(column)

    batches = split(data(7, 3, 8, 8), 4, 3)
    outputs = []
    for norm in (torch.nn.BatchNorm2d, Divided, Multiplied):
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), norm(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), norm(4)
        )
        torch.nn.init.uniform_(module[1].weight, -1, 2)
        exported = to_onnx(to_program(module.eval(), batches[0]))
        assert (count(exported, "BatchNormalization") == 0) == (norm is not torch.nn.BatchNorm2d)
        if norm is Multiplied:
            with pytest.raises(ModelError, match="BN307"):
                recalibrate(exported, batches)
            continue
        new, sites, _ = recalibrate(exported, batches)
        assert [s.action for s in sites] == ["recalibrated"] * 2
        feeds = {str(new.graph.inputs[0].name): batches[0].args[0]}
        outputs.append(next(iter(run(new, feeds, inner=False).values())))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def check_fixed_point(model: ir.Model, batches: list[Batch], found: int) -> None:
    """The definition of exact: in the new model, what each node sees has the statistics that it stores. The old model fails."""
    new, sites, _ = recalibrate(model, batches)
    assert [s.action for s in sites] == ["recalibrated"] * found
    assert discrepancies(new, batches).max() < 1e-4
    assert np.median(discrepancies(model, batches)) > 0.1


def discrepancies(model: ir.Model, batches: list[Batch]) -> Array:
    nodes = [n for n in model.graph if n.op_type == "BatchNormalization"]
    name = next(str(v.name) for v in model.graph.inputs if not v.is_initializer())
    feeds = [{name: batch.args[0]} for batch in batches]
    runs = [run(model, feed) | feed for feed in feeds]
    worst = []
    for node in nodes:
        mean, var = over(np.concatenate([values[str(node.inputs[0].name)] for values in runs]))
        stored = [constant(v, runs[0]).astype(np.float64) for v in node.inputs[3:5]]
        scale = var + node.attributes.get_float("epsilon", 1e-5)
        worst.append(max(np.max(np.abs(stored[0] - mean) / np.sqrt(scale)), np.max(np.abs(stored[1] - var) / scale)))
    return np.array(worst)


def constant(value: ir.Value, values: dict[str, Array]) -> Array:
    return values[str(value.name)] if value.const_value is None else value.const_value.numpy()


LIGHT_MODELS = [
    pytest.param("shufflenet", 49),
    pytest.param("resnet50", 53, marks=pytest.mark.slow),
    pytest.param("densenet121", 121, marks=pytest.mark.slow),
    pytest.param("inception_v2", 69, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "found"), LIGHT_MODELS)
def test_models_of_the_onnx_package(name: str, found: int) -> None:
    """They have a fixed batch size of one; their weights are ConstantOfShape nodes, so that channels are equal."""
    path = LIGHT / f"light_{name}.onnx"
    if not path.exists():
        pytest.skip("this build of the onnx package has no test data")
    check_fixed_point(ir.load(path), split(data(2, 3, 224, 224), 1, 1), found)


@pytest.mark.parametrize(
    ("name", "found", "size"),
    [
        ("ch_ppocr_mobile_v2.0_cls_infer", 35, (48, 192)),
        ("ch_PP-OCRv4_det_infer", 3, (96, 96)),
        ("ch_PP-OCRv4_rec_infer", 6, (48, 160)),
    ],
)
def test_models_of_paddle(name: str, found: int, size: tuple[int, int]) -> None:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        pytest.skip("PP-OCR comes with the package rapidocr_onnxruntime, which is not installed")
    path = Path(package.submodule_search_locations[0], "models", f"{name}.onnx")
    check_fixed_point(ir.load(path), split(data(5, 3, *size), 2, 2, 1), found)
