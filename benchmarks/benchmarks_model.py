"""A model of the onnx package with real weights: its ConstantOfShape nodes become random initializers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


def write(source: str, target: str) -> None:
    """Replace every constant weight by random numbers of its shape: positive variances, He-scaled kernels."""
    model = onnx.load(source)
    graph = model.graph
    shapes = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    generator = np.random.default_rng(0)
    variances = {node.input[4] for node in graph.node if node.op_type == "BatchNormalization"}
    kept = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(int(n) for n in shapes[node.input[0]])
        values = generator.standard_normal(shape) * np.sqrt(2 / max(int(np.prod(shape[1:])), 1))
        if node.output[0] in variances:
            values = generator.uniform(0.5, 2, shape)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    model.ir_version = max(model.ir_version, 4)  # before that, initializers had to be inputs too
    onnx.save(model, target)
