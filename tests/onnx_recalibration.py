"""Recalibration of ONNX models: a naive float64 reference, one pass per BatchNormalization, and small models to try it on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from bnctl.data.batches import Batch
from bnctl.engines.onnx import recalibrate as engine
from bnctl.recalibration.statistics import SiteStatistics
from test_onnx_checks import FREE, Net

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
