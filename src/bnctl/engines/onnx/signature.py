"""Example inputs from an ONNX model's own signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnctl.data.synthetic import InputSpec
from bnctl.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir

BATCH = 2
SIDE = 64


def input_specs(model: Any) -> tuple[InputSpec, ...]:
    """Names, shapes and types of the inputs that a caller must give.

    A free first axis becomes 2, any other free axis 64; axes of one name get one size.

    Raises:
        UsageError: an input does not say how many axes it has.
    """
    native: onnx_ir.Model = model
    given = [value for value in native.graph.inputs if value.name not in native.graph.initializers]
    first = {str(value.shape[0]) for value in given if value.shape and not isinstance(value.shape[0], int)} - {"None"}
    specs = []
    for value in given:
        if value.shape is None or value.dtype is None:
            raise UsageError(
                f"input {value.name} does not say its shape", hint=f"give --input {value.name}:1x3x224x224"
            )
        shape = tuple(
            d if isinstance(d, int) and d > 0 else BATCH if axis == 0 or str(d) in first else SIDE
            for axis, d in enumerate(value.shape)
        )
        specs.append(InputSpec(shape, str(value.name), str(value.dtype.numpy())))
    return tuple(specs)
