"""The few layers and hooks that surgery leaves in a user's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INSERTED = "norm"
"""Name under which an inserted normalisation hangs below its layer: ``conv1`` gets ``conv1.norm``; no other name in the state dict changes."""


class Pointwise(nn.Module):
    """An elementwise operator that was kept of a removed layer, by its name in torch (``aten.relu.default``)."""

    def __init__(self, op: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        super().__init__()
        namespace, name, overload = op.split(".")
        if namespace != "aten":
            raise ValueError(f"{op}: only operators of torch itself")
        self.op, self.args, self.kwargs = op, tuple(args), dict(kwargs or {})
        self._call = getattr(getattr(torch.ops.aten, name), overload)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator."""
        return self._call(x, *self.args, **self.kwargs)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The operator's name."""
        return self.op

    def __deepcopy__(self, memo: dict[int, Any]) -> Pointwise:
        return Pointwise(self.op, self.args, self.kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pointwise, (self.op, self.args, self.kwargs)


class LastAxisBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the last axis of an input of any rank: for linear layers on (N, L, C), whose features come last."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _apply_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.get_submodule(INSERTED)(output)  # type: ignore[no-any-return]


def attach_norm(layer: nn.Module, norm: nn.Module) -> None:
    """Let ``layer`` normalise its output: the norm becomes its child, called by a forward hook.

    A hook of a module-level function survives ``copy.deepcopy`` and pickling, and leaves the layer's class and parameter names alone.
    """
    layer.add_module(INSERTED, norm)
    layer.register_forward_hook(_apply_norm)


def _append_ones(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x,) = args
    spatial = module.get_parameter("weight").ndim - 2
    return (nn.functional.pad(x, [0, 0] * spatial + [0, 1], value=1.0),)


def attach_ones(layer: nn.Module) -> None:
    """Let a convolution see a further channel of ones behind those of its input."""
    layer.register_forward_pre_hook(_append_ones)


def appends_ones(hook: Any) -> bool:
    """Whether a pre-hook is that of :func:`attach_ones`."""
    return hook is _append_ones


def inserted_norm(layer: nn.Module) -> nn.Module | None:
    """The norm that :func:`attach_norm` hung below a layer, if any."""
    attached = any(hook is _apply_norm for hook in layer._forward_hooks.values())
    return layer._modules.get(INSERTED) if attached else None


def detach_norm(layer: nn.Module) -> None:
    """The inverse of :func:`attach_norm`."""
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _apply_norm]:
        del layer._forward_hooks[key]
    del layer._modules[INSERTED]
