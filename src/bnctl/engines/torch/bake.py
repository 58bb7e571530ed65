"""Layers whose weight is computed in every pass (weight_norm, spectral_norm, standardised convolutions): replaced by a plain layer that stores the result.

In inference the computed weight is a constant: it derives from parameters alone. A module call that does nothing to data but one linear operator can
therefore give way to ``nn.Conv2d`` and its like with the weight of the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnctl.engines.torch.calls import Calls
from bnctl.engines.torch.hooks import computes_weights
from bnctl.engines.torch.record import ModuleCall, OpCall, Ref, Trace

_KINDS = {
    **{f"aten.conv{n}d.{form}": f"Conv{n}d" for n in (1, 2, 3) for form in ("default", "padding")},
    **{
        f"aten.conv_transpose{n}d.{form}": f"ConvTranspose{n}d"
        for n, form in ((1, "default"), (2, "input"), (3, "input"))
    },
    "aten.linear.default": "Linear",
}
_ARGUMENTS = {
    "Conv": ("stride", "padding", "dilation", "groups"),
    "ConvTranspose": ("stride", "padding", "output_padding", "groups", "dilation"),
    "Linear": (),
}


@dataclass(frozen=True, eq=False)
class Bake:
    """A plain layer in the place of one that computes its weight.

    Args:
        path: of the module.
        kind: class in ``torch.nn``.
        args: its arguments, as JSON; ``bias`` among them.
        weight, bias: what the layer computed.
    """

    path: str
    kind: str
    args: dict[str, Any]
    weight: Tensor
    bias: Tensor | None

    def edit(self) -> dict[str, Any]:
        """The structural edit, without values."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return {"edit": "bake", "module": self.path, "layer": self.kind, "args": self.args, "dtype": dtype}

    def fill(self, model: nn.Module) -> None:
        """Give the new layer its values."""
        with torch.no_grad():
            model.get_parameter(f"{self.path}.weight").copy_(self.weight)
            if self.bias is not None:
                model.get_parameter(f"{self.path}.bias").copy_(self.bias)


def bake(call: ModuleCall, op: OpCall, inside: list[OpCall], trace: Trace) -> Bake | None:
    """The plain layer that computes what a module call did; None where it did more than one linear operator.

    Args:
        call: the module call.
        op: the linear operator, with a computed weight.
        inside: all operators that ran in the call.
        trace: the record.
    """
    data = [c for c in inside if not all(v in trace.tensors for v in c.outputs)]
    kind = _KINDS.get(op.op)
    if kind is None or call.path is None or data != [op] or not call.plain or call.outputs != list(op.outputs):
        return None
    if op.args[0] != call.args[0] or any(not computes_weights(h) for h in call.module._forward_pre_hooks.values()):
        return None
    if call.module._forward_hooks or call.module._backward_hooks or call.module._backward_pre_hooks or op.kwargs:
        return None
    given = [trace.tensors.get(a.value) if isinstance(a, Ref) else a for a in op.args[1:3]]
    weight, bias = given[0], given[1] if len(given) > 1 else None
    if not isinstance(weight, Tensor) or (len(op.args) > 2 and op.args[2] is not None and bias is None):
        return None
    args = dict(zip(_ARGUMENTS[kind.rstrip("123d") if kind != "Linear" else kind], op.args[3:], strict=False))
    if kind == "Linear":
        args |= {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    else:
        first, second = weight.shape[0], weight.shape[1] * args.get("groups", 1)
        inner, outer = (first, second) if "Transpose" in kind else (second, first)
        args |= {"in_channels": inner, "out_channels": outer, "kernel_size": list(weight.shape[2:])}
    return Bake(call.path, kind, args | {"bias": bias is not None}, weight.detach(), bias)


class Bakes:
    """The plain layers that can stand for modules that compute their weight.

    Args:
        calls: of the record.

    Attributes:
        found: those that have been asked for, by path.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.found: dict[str, Bake] = {}

    def of(self, op: OpCall) -> Bake | None:
        """The layer in the place of the module that a linear operator with a computed weight ran in; all calls must agree."""
        path = op.within.path
        if path is None:
            return None
        if path not in self.found:
            if self._is_read_elsewhere(op.within.module, path):
                return None
            first, *rest = (self._of_call(call, op) for call in self.calls.of[id(op.within.module)])
            if first is None or any(
                b is None or b.args != first.args or not b.weight.equal(first.weight) for b in rest
            ):
                return None
            self.found[path] = first
        return self.found[path]

    def _of_call(self, call: ModuleCall, op: OpCall) -> Bake | None:
        inside = self.calls.inside.get(call, [])
        linear = [c for c in inside if c.op == op.op]
        return bake(call, linear[0], inside, self.calls.trace) if len(linear) == 1 else None

    def _is_read_elsewhere(self, module: nn.Module, path: str) -> bool:
        """Whether code that does not run in a call of a module reads what is the module's alone: its parameters, and what its calls make of them. Reading a
        parametrised weight from outside calls the module's parts, not the module.
        """
        every, trace = self.calls.of[id(module)], self.calls.trace
        inside = {id(op) for call in every for op in self.calls.inside.get(call, ())}
        parts = {id(part) for part in module.modules()}
        own = [v for v, names in trace.parameters.items() if all(name.startswith(f"{path}.") for name in names)]
        made = [v for call in every for op in self.calls.inside.get(call, ()) for v in op.outputs if v in trace.tensors]
        return any(id(op) not in inside for v in (*own, *made) for op in self.calls.readers.get(v, ())) or any(
            id(call.module) not in parts for v in (*own, *made) for call in self._givers.get(v, ())
        )

    @cached_property
    def _givers(self) -> dict[int, list[ModuleCall]]:
        """The calls of modules that return each value which derives from parameters alone; the model's own among them."""
        found: dict[int, list[ModuleCall]] = {}
        for call in self.calls.trace.modules:
            for value in call.outputs:
                if value in self.calls.trace.tensors:
                    found.setdefault(value, []).append(call)
        return found


def build(kind: str, args: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The plain layer, not initialised; ``args`` from JSON.

    Raises:
        ValueError: the class is none of the linear layers.
    """
    if kind not in _KINDS.values():
        raise ValueError(f"{kind} is no linear layer")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    layer: nn.Module = nn.utils.skip_init(getattr(nn, kind), **settings, dtype=dtype, device=device)
    return layer
