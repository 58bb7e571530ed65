"""Example inputs from an ONNX model's own signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnctl.data.synthetic import InputSpec
from bnctl.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir

BATCH = 2
SIDE = 64


def input_specs(model: Any, name: str, other: Any = None) -> tuple[InputSpec, ...]:
    """Names, shapes and types of the inputs that a caller must give.

    A free first axis becomes 2, any other free axis 64; axes of one name get one size.

    Args:
        model: the model.
        name: what to call it in errors.
        other: a model that is to take the same inputs: where it has a size for an axis that is free here, that.

    Raises:
        UsageError: an input does not say how many axes it has, or holds no numbers.
    """
    native: onnx_ir.Model = model
    given = [value for value in native.graph.inputs if value.name not in native.graph.initializers]
    first = {str(value.shape[0]) for value in given if value.shape and not isinstance(value.shape[0], int)} - {"None"}
    sizes = {} if other is None else {value.name: tuple(value.shape or ()) for value in other.graph.inputs}
    specs = []
    for value in given:
        held = _no_numbers(value)
        if held is not None:
            raise UsageError(
                f"{name}: input {value.name} holds {held}, which cannot be made up",
                hint="give batches of your own with --data package.module:callable; bnctl fold --no-verify runs nothing",
            )
        if value.shape is None or value.dtype is None:
            raise UsageError(
                f"{name}: input {value.name} does not say its shape", hint=f"give --input {value.name}:1x3x224x224"
            )
        theirs = sizes.get(value.name, ())
        shape = tuple(
            next(
                (n for n in (d, *theirs[axis : axis + 1]) if isinstance(n, int) and n > 0),
                BATCH if axis == 0 or str(d) in first else SIDE,
            )
            for axis, d in enumerate(value.shape)
        )
        specs.append(InputSpec(shape, str(value.name), str(value.dtype.numpy())))
    return tuple(specs)


def _no_numbers(value: onnx_ir.Value) -> str | None:
    """What an input holds that is no tensor of numbers."""
    import onnx_ir

    if value.type is not None and not isinstance(value.type, onnx_ir.TensorType):
        return f"no tensor but {type(value.type).__name__}"
    return "strings" if value.dtype == onnx_ir.DataType.STRING else None
