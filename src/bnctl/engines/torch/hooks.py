"""Who sees a value besides the operators that read it: callers, hooks, caches."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnctl.codes import Obstacle
from bnctl.engines.torch.layers import appends_ones, inserted_norm
from bnctl.engines.torch.record import Trace


def computes_weights(hook: Any) -> bool:
    """Whether a pre-hook is one of torch's own that put a computed weight in place."""
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    return isinstance(hook, (SpectralNorm, WeightNorm))


def watched_at_entry(module: nn.Module) -> bool:
    """Whether somebody's pre-hook sees the module's input."""
    return any(not (computes_weights(hook) or appends_ones(hook)) for hook in module._forward_pre_hooks.values())


def hooked(module: nn.Module) -> bool:
    """Whether hooks see the output, or its gradient: those that bnctl put there itself apart."""
    ours = inserted_norm(module) is not None
    forward = len(module._forward_hooks) - (1 if ours else 0)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def observed(trace: Trace) -> dict[int, Obstacle]:
    """The values that must not change, and why: outputs of the model, what hooks see, what outlives the pass."""
    found = dict.fromkeys(trace.held, Obstacle("BN107", "the tensor is kept after the pass, by a hook or an attribute"))
    for call in trace.modules:
        after = hooked(call.module)
        if after or watched_at_entry(call.module):
            seen = (*call.inputs, *(call.outputs if after else ()))
            found |= dict.fromkeys(seen, Obstacle("BN107", f"a hook of {call.path} sees it"))
    found |= dict.fromkeys(trace.viewed, Obstacle("BN102", "an output of the model is a view of it"))
    return found | dict.fromkeys(trace.outputs, Obstacle("BN102", "it is an output of the model"))
