"""Moments of values inside an ONNX model over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.errors import DataError
from bnctl.numerics.moments import Moments

if TYPE_CHECKING:
    from bnctl.data.batches import Batch

Run = Callable[["Batch"], Mapping[str, NDArray[Any]]]
"""A model that is ready to run: outputs by name."""


def calibrate(
    model: ir.Model, names: Sequence[str], batches: Iterable[Batch], start: Callable[[ir.Model], Run]
) -> dict[str, Moments]:
    """Moments per channel (axis 1) of some values, over all data, in one pass.

    Args:
        model: not changed; a copy gets the values as outputs.
        names: of values of the main graph.
        batches: the data.
        start: makes a model ready to run, for example ``lambda model: OrtRunner(model).run``. The runtime's own optimisations must be off.

    Raises:
        DataError: there are no data, or a value is not finite.
    """
    run = start(_exposing(model, names))
    gathered: dict[str, Moments] = {}
    number = -1
    for number, batch in enumerate(batches):
        outputs = run(batch)
        for name in names:
            moments = Moments.of(outputs[name], axis=1)
            if not np.isfinite(moments.m2).all():
                raise DataError(f"batch {number}: {name} is not finite", hint="look for NaN or infinity in the data")
            gathered[name] = gathered[name].merge(moments) if name in gathered else moments
    if number < 0:
        raise DataError("the data hold no batch", hint="check --data")
    return gathered


def _exposing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    clone = model.clone()
    values = {str(v.name): v for node in clone.graph for v in node.outputs}
    clone.graph.outputs.extend(v for v in map(values.__getitem__, dict.fromkeys(names)) if not v.is_graph_output())
    return clone
