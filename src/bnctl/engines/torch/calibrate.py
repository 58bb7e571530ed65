"""Moments of layers' outputs over data, in one pass: what inserted norms are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bnctl.engines.torch.recalibration.activations import activation_seen
from bnctl.errors import BnctlError, DataError
from bnctl.numerics.moments import Moments
from bnctl.runtime.tensors import as_tensors, does_not_run

if TYPE_CHECKING:
    from bnctl.data.batches import Batch


def output_moments(model: nn.Module, axes: Mapping[str, int], batches: Iterable[Batch]) -> dict[str, Moments]:
    """Moments per channel of the outputs of some layers, over all their calls and all data.

    Args:
        model: run in the mode it is in, without gradients.
        axes: the channel axis of each layer's output, by layer name.
        batches: the data.

    Raises:
        DataError: there are no data, the model fails on a batch, or a layer's output is not finite.
    """
    gathered: dict[str, Moments] = {}
    number = 0

    def gather(name: str, axis: int, output: Tensor) -> None:
        moments = activation_seen(output.movedim(axis, 1) if output.ndim > 2 else output).values
        if not torch.isfinite(torch.from_numpy(moments.m2)).all():
            raise DataError(
                f"batch {number}: the output of {name} is not finite", hint="look for NaN or infinity in the data"
            )
        gathered[name] = gathered[name].merge(moments) if name in gathered else moments

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, n=name, a=axis: gather(n, a, output)
        )
        for name, axis in axes.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                args, kwargs = as_tensors(batch, model)
                try:
                    model(*args, **kwargs)
                except BnctlError:
                    raise
                except Exception as error:
                    raise does_not_run(number, error) from error
                number += 1
    finally:
        for handle in handles:
            handle.remove()
    if number == 0:
        raise DataError("the data hold no batch", hint="check --data")
    return gathered
