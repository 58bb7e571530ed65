"""The parameters of a BatchNormalization node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.engines.onnx.constants import Constants

Vector = NDArray[np.float64]

EPSILON = 1e-5
"""The operator's default. Like all attributes it is a float32, also where a model in memory holds a double."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Parameters of a BatchNorm; all vectors are float64 of shape (C,)."""

    gamma: Vector
    beta: Vector
    mean: Vector
    var: Vector
    eps: float

    @classmethod
    def read(cls, node: ir.Node, constants: Constants) -> Statistics | None:
        """Those of a BatchNormalization node, or None where one of them is not constant."""
        arrays = [constants.array(value) for value in node.inputs[1:5]]
        if any(a is None for a in arrays):
            return None
        gamma, beta, mean, var = (np.asarray(a, np.float64) for a in arrays)
        return cls(gamma, beta, mean, var, float(np.float32(node.attributes.get_float("epsilon", EPSILON))))
