"""ONNX files of the zoo: random parameters where a file has none, BatchNormalization nodes, and outputs with the runtime's own optimisations off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

SIZES = {"det": (640, 640), "rec": (48, 320), "cls": (48, 192)}
"""Height and width for PP-OCR, whose files leave them open."""


def files(folder: Path | None) -> Iterator[Path]:
    """The files that come with the ``onnx`` package, and those below a folder."""
    light = Path(onnx.__file__).parent / "backend/test/data/light"
    yield from sorted(p for p in light.glob("light_*.onnx") if count(onnx.load(p)))
    if folder is not None:
        yield from sorted(p for p in folder.rglob("*.onnx") if count(onnx.load(p)))


def count(model: onnx.ModelProto) -> int:
    """BatchNormalization nodes."""
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


def randomise(model: onnx.ModelProto, seed: int = 0) -> bool:
    """Give a file whose parameters are placeholders (ConstantOfShape) random ones: whether there was anything to do.

    Weights ~ N(0, 2/fan_in), gamma ~ U(-0.3, 1.5), var ~ U(0.5, 2), everything else N(0, 0.2).
    """
    rng = np.random.default_rng(seed)
    shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = [n for n in model.graph.node if n.op_type == "ConstantOfShape" and n.input[0] in shapes]
    role = {}
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            role |= {node.input[1]: "gamma", node.input[4]: "var"}
    for node in made:
        shape = tuple(int(n) for n in shapes[node.input[0]])
        name = node.output[0]
        if role.get(name) == "gamma":
            array = rng.uniform(-0.3, 1.5, shape)
        elif role.get(name) == "var":
            array = rng.uniform(0.5, 2.0, shape)
        else:
            array = rng.normal(0, 0.2, shape)
            if len(shape) > 1:
                array *= np.sqrt(2 / np.prod(shape[1:])) / 0.2
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        model.graph.node.remove(node)
    if made:  # in IR version 3 every initializer is an input, too, which a caller may override
        model.ir_version = 8
        for value in [v for v in model.graph.input if v.name in shapes]:
            model.graph.input.remove(value)
    return bool(made)


def feeds(model: onnx.ModelProto, name: str, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs; open sizes are batch 1 and those of the task."""
    rng = np.random.default_rng(seed)
    height, width = next((hw for key, hw in SIZES.items() if f"_{key}_" in name), (224, 224))
    stored = {t.name for t in model.graph.initializer}
    found = {}
    for value in model.graph.input:
        if value.name not in stored:
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
            shape = [d if d > 0 else other for d, other in zip(dims, (1, 3, height, width), strict=True)]
            found[value.name] = rng.standard_normal(shape).astype(np.float32)
    return found


def outputs(model: onnx.ModelProto, inputs: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Run with every optimisation of the runtime off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))
