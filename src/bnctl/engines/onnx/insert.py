"""BatchNormalization behind linear operators, with parameters that make it the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.engines.onnx.editor import Editor
from bnctl.engines.onnx.lift import Lifted
from bnctl.engines.onnx.scopes import opsets
from bnctl.numerics.batchnorm import identity_parameters
from bnctl.numerics.moments import Moments
from bnctl.plan.insert import InsertSite

Array = NDArray[np.float64]

_MIXED_TYPES_OPSET = 15
"""From this opset on, the parameters of BatchNormalization may have another type than its input."""


def apply_insert(lifted: Lifted, sites: Sequence[InsertSite], moments: Mapping[str, Moments], eps: float) -> ir.Model:
    """A new model with a BatchNormalization behind each site.

        mean = mu,   var = sigma^2,   gamma = sqrt(var + eps),   beta = mean

    Mean and variance are cast to the parameters' type first and gamma and beta computed from what was stored, so that nothing is lost twice. All who
    read the value read the normalised one, under the same name.

    Args:
        lifted: the model.
        sites: where to insert; the channels of each value are its axis 1.
        moments: of the value behind each site, by site name; vectors of its channels.
        eps: of the new nodes.

    Raises:
        OverflowInFoldError: statistics are not finite or do not fit the type of the parameters.
    """
    editor = Editor(lifted.model)
    opset = opsets(lifted.model.opset_imports).get("", 0)
    for site in sites:
        for node in site.nodes:
            output = lifted.graph.values[node.outputs[0]]
            native = editor.value(output.name).producer()
            assert native is not None
            parameters = _parameters(moments[site.name], eps, _parameter_type(output.dtype, opset))
            inputs = [
                editor.initializer(site.name, f"{site.name}.bn.{name}", *array) for name, array in parameters.items()
            ]
            editor.append(native, "BatchNormalization", inputs, {"epsilon": float(eps)})
    return editor.model


def _parameters(moments: Moments, eps: float, dtype: ir.DataType) -> dict[str, tuple[Array, ir.DataType]]:
    """Arrays in the order of the operator's inputs, each with the type in which it is stored."""
    mean, var = (a.astype(dtype.numpy()).astype(np.float64) for a in (moments.mean, moments.variance()))
    gamma, beta = identity_parameters(mean, var, _as_stored(eps))
    return {
        name: (array, dtype)
        for name, array in (("weight", gamma), ("bias", beta), ("running_mean", mean), ("running_var", var))
    }


def _parameter_type(value: str, opset: int) -> ir.DataType:
    half = value in {"float16", "bfloat16"}
    return ir.DataType.FLOAT if half and opset >= _MIXED_TYPES_OPSET else ir.DataType.from_numpy(np.dtype(value))


def _as_stored(eps: float) -> float:
    """Attributes are float32."""
    return float(np.float32(eps))
