"""From a batch to the tensors that a module takes."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from bnctl.errors import DataError

if TYPE_CHECKING:
    from bnctl.data.batches import Batch


def as_tensors(
    batch: Batch, module: torch.nn.Module, device: torch.device | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a module's forward.

    Arrays become tensors on the module's device (or ``device``); a float array takes the type of the module's first
    float parameter. Tensors of the user keep their type. Nested containers and dataclasses are looked into.
    """
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    float_type = None if first is None else first.dtype
    place = device or (torch.device("cpu") if first is None else first.device)

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _moved(value, place, value.dtype, copy=True)  # a model may write into its input
        if isinstance(value, np.ndarray):
            tensor = _from_array(
                np.array(value, value.dtype if value.dtype.isnative else value.dtype.newbyteorder("="))
            )
            return _moved(tensor, place, (tensor.is_floating_point() and float_type) or tensor.dtype, copy=False)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: pytree.tree_map(convert, getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        return value

    return pytree.tree_map(convert, _by_position(module, tuple(batch.args), dict(batch.kwargs)))  # type: ignore[no-any-return]


def _by_position(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as an exported graph takes them: it knows the names of its positional inputs, and takes them by position only."""
    codegen = getattr(module.graph, "_codegen", None) if isinstance(module, torch.fx.GraphModule) else None
    known = getattr(codegen, "pytree_info", None)
    if known is None or known.in_spec is None:
        return args, kwargs
    names = known.orig_args[: known.in_spec.child(0).num_children]
    if set(kwargs) != set(names[len(args) :]):
        return args, kwargs
    return (*args, *(kwargs[name] for name in names[len(args) :])), {}


def hint_of(error: Exception, otherwise: str) -> str:
    """What to do about inputs that a module does not take: a graph of torch.export says for which batch size it was made."""
    found = re.search(r"Guard failed: .*size\(\)\[0\] == (\d+)", str(error))
    if found is None:
        return otherwise
    return (
        f"the graph was exported for batches of {found[1]}: --batch-size {found[1]} makes such batches of the data (--limit leaves out a smaller last one), "
        "or export it for any batch size"
    )


def does_not_run(number: int, error: Exception) -> DataError:
    """What to say where a model fails on a batch of the data."""
    hint = "check shape, dtype and preprocessing of the data against what the model's forward takes"
    return DataError(
        f"batch {number} does not run through the model: {type(error).__name__}: {error}", hint=hint_of(error, hint)
    )


def _from_array(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # which numpy knows through ml_dtypes only
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise DataError(f"an input of type {array.dtype} is no tensor", hint="give numbers") from error


def _moved(tensor: torch.Tensor, place: torch.device, dtype: torch.dtype, *, copy: bool) -> torch.Tensor:
    """On the device, in the type; to a GPU from pinned memory, beside what runs there."""
    if place.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(place, dtype, non_blocking=True)
    return tensor.to(place, dtype, copy=copy)
