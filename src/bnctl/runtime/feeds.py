"""From a batch to the named inputs of an ONNX model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnctl.errors import ModelError

if TYPE_CHECKING:
    from bnctl.data.batches import Batch

_NUMPY_NAMES = {"float": "float32", "double": "float64", "string": "object"}


@dataclass(frozen=True)
class InputSpec:
    """What the model says about one of its inputs.

    Attributes:
        name: of the input.
        dtype: name of the element type as numpy (or ml_dtypes) spells it.
        shape: one entry per axis; an int where the size is fixed, anything else where it is free. Empty: not said.
    """

    name: str
    dtype: str
    shape: tuple[Any, ...]


def dtype_of(onnx_type: str) -> str:
    """numpy's name for a tensor type of ONNX Runtime: "tensor(float)" is "float32"."""
    tensor = onnx_type.startswith("tensor(")
    element = onnx_type.removeprefix("tensor(").removesuffix(")") if tensor else onnx_type
    return _NUMPY_NAMES.get(element, element)


def match_inputs(
    batch: Batch, required: Sequence[InputSpec], optional: Sequence[InputSpec], model: str
) -> dict[str, NDArray[Any]]:
    """Arrays for the inputs of a model: positional arguments in order, keyword arguments by name, cast where that is
    safe.

    Args:
        batch: the inputs.
        required: inputs without a default, in the model's order.
        optional: inputs with a default (overridable initializers); by keyword only.
        model: what to call the model in errors.

    Raises:
        ModelError: too many or too few inputs, an unknown name, or a shape or type that the input does not take.
    """
    known = {spec.name: spec for spec in (*required, *optional)}
    signature = ", ".join(map(_describe, required))
    if len(batch.args) > len(required):
        raise ModelError(
            f"{model} takes {len(required)} inputs, got {len(batch.args)}", hint=f"its inputs: {signature}"
        )
    given: dict[str, Any] = {spec.name: value for spec, value in zip(required, batch.args, strict=False)}
    for name, value in batch.kwargs.items():
        if name not in known or name in given:
            problem = "is given twice" if name in given else "is unknown"
            raise ModelError(f"{model}: input {name!r} {problem}", hint=f"its inputs: {signature}")
        given[name] = value
    missing = [spec.name for spec in required if spec.name not in given]
    if missing:
        raise ModelError(
            f"{model}: no value for input {', '.join(map(repr, missing))}", hint=f"its inputs: {signature}"
        )
    return {name: fit(value, known[name], model) for name, value in given.items()}


def fit(value: Any, spec: InputSpec, model: str) -> NDArray[Any]:
    """One value as the array that an input takes.

    Floats are cast to the input's float type and integers to its integer type, if every value survives. Other kinds
    of cast (images as uint8 to float) change what the numbers mean and are left to the user.

    Raises:
        ModelError: no array, another rank, a fixed axis of another size, or a type that cannot be cast.
    """
    array = as_array(value)
    where = f"{model}: input {spec.name!r} expects {_describe(spec)}"
    if array.dtype == object and spec.dtype != "object":
        raise ModelError(f"{where}, got {type(value).__name__}", hint="give one array per input")
    fits = not spec.shape or (
        len(spec.shape) == array.ndim
        and all(not isinstance(want, int) or want == got for want, got in zip(spec.shape, array.shape, strict=True))
    )
    if not fits:
        hint = "give inputs of that shape (--input, --data)"
        if len(spec.shape) == array.ndim and isinstance(spec.shape[0], int) and 0 < spec.shape[0] != array.shape[0]:
            hint += (
                f"; --batch-size {spec.shape[0]} makes such batches of the data (--limit leaves out a smaller last one)"
            )
        raise ModelError(f"{where}, got shape {list(array.shape)}", hint=hint)
    cast = _cast(array, spec.dtype)
    if cast is None:
        raise ModelError(f"{where}, got {array.dtype}, which cannot be cast safely", hint=f"convert it to {spec.dtype}")
    return np.ascontiguousarray(cast)


def as_array(value: Any) -> NDArray[Any]:
    """A value as a numpy array; torch tensors are recognised by their methods, so that torch is not needed."""
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        array: NDArray[Any] = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
        return array
    try:
        return np.asarray(value)
    except ValueError:  # a ragged list
        return np.asarray(None, dtype=object)


def _cast(array: NDArray[Any], wanted: str) -> NDArray[Any] | None:
    dtype = _dtype(wanted)
    if dtype is None or array.dtype == dtype:
        return array if dtype else None
    integers = array.dtype.kind in "iu" and dtype.kind in "iu"
    floats = array.dtype.kind == "f" and _is_float(dtype)
    if not (integers or floats):
        return None
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    survives = np.array_equal(cast, array) if integers else np.array_equal(_finite(cast), _finite(array))
    return cast if survives else None


def _finite(array: NDArray[Any]) -> NDArray[Any]:
    return np.isfinite(array.astype(np.float64))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def _dtype(name: str) -> np.dtype[Any] | None:
    import ml_dtypes

    with contextlib.suppress(TypeError):
        return np.dtype(getattr(ml_dtypes, name, name))
    return None


def _describe(spec: InputSpec) -> str:
    return f"{spec.name}: {spec.dtype} {list(spec.shape)}"
