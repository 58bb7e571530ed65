"""Count executed BatchNorms, independently of bnctl: by the calls of torch's own function, not by modules and not by a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

POSITION = {functional.batch_norm: 1, torch.batch_norm: 3}
"""Where the running mean stands among the arguments."""


def is_norm(module: nn.Module) -> bool:
    """A module with running statistics: BatchNorm of any class, torchvision's FrozenBatchNorm2d."""
    return getattr(module, "running_mean", None) is not None


class _Counter(TorchFunctionMode):
    """Sees every call of a torch function from Python. A mode is off while it handles one, so nothing is counted twice."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in POSITION:
            at = POSITION[func]
            mean = args[at] if len(args) > at else kwargs.get("running_mean")
            self.calls += mean is not None  # without: weight standardisation, batch statistics
        return func(*args, **kwargs)


def count(model: nn.Module, run: Callable[[], Any]) -> int:
    """BatchNorm operators with running statistics that one forward pass executes; frozen ones, which are plain arithmetic, by hooks."""
    frozen = 0

    def hook(*_: Any) -> None:
        nonlocal frozen
        frozen += 1

    handles = [m.register_forward_hook(hook) for m in model.modules() if type(m).__name__.startswith("FrozenBatchNorm")]
    try:
        with _Counter() as counter, torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return counter.calls + frozen
