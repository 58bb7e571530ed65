"""Normalisation operators seen at the dispatcher: one place that every batch normalisation passes, whatever class called it.

Below autograd and without decomposition, ``nn.BatchNorm2d``, a subclass of it, ``F.batch_norm`` in custom code and an
exported graph all end in one of the operators of :data:`STATISTICS_READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnctl.engines.torch.schema import operator_of

_ALIASES = {"use_input_stats": "training", "exponential_average_factor": "momentum", "epsilon": "eps"}

STATISTICS_READERS = frozenset(
    {
        "aten::batch_norm",
        "aten::instance_norm",
        "aten::native_batch_norm",
        "aten::_native_batch_norm_legit",
        "aten::_native_batch_norm_legit_no_training",
        "aten::_batch_norm_no_update",
        "aten::cudnn_batch_norm",
        "aten::miopen_batch_norm",
    }
)
"""Operators that normalise with running statistics when they are not told to train."""


@dataclass(frozen=True)
class NormCall:
    """One call of a normalisation operator that was given running statistics.

    Args:
        x: input, (N, C, ...); channels on axis 1.
        weight: gamma (C,), or None.
        bias: beta (C,), or None.
        mean: the running mean (C,): the very tensor that the model keeps.
        var: the running variance (C,).
        training: the operator normalises with the statistics of `x`, not with the running ones.
        momentum: as the operator was given it.
        eps: added to the variance.
        per_instance: instance normalisation: statistics belong to one sample.
        outputs: how many values the operator returns.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    training: bool
    momentum: float
    eps: float
    per_instance: bool
    outputs: int

    def with_own_statistics(self) -> Any:
        """What the operator returns in training, the running statistics left as they are.

        ``y = (x - mean(x)) / sqrt(var(x) + eps) * gamma + beta``, with the biased variance of this call alone.
        """
        return self._result(None, None, training=True)

    def with_statistics(self, mean: torch.Tensor, var: torch.Tensor) -> Any:
        """What the operator returns in inference with other running statistics, (C,)."""
        return self._result(mean.to(self.mean), var.to(self.var), training=False)

    def _result(self, mean: torch.Tensor | None, var: torch.Tensor | None, *, training: bool) -> Any:
        operator = torch.ops.aten.instance_norm if self.per_instance else torch.ops.aten.batch_norm
        y = operator(self.x, self.weight, self.bias, mean, var, training, 0.0, self.eps, True)
        if self.outputs == 1:
            return y
        # the further outputs are saved for a backward pass that does not come: empty, as in inference
        return (y, *(self.x.new_empty(0) for _ in range(self.outputs - 1)))


OnWrite = Callable[[torch.Tensor], None]
"""Called before any other operator writes to a tensor."""

OnNorm = Callable[[NormCall], Any]
"""Called at each normalisation; what it returns takes the place of the operator's result, unless it is None."""


def read_call(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall | None:
    """The call as a :class:`NormCall`, or None where it is no normalisation or has no running statistics."""
    if (signature := _signature(operator)) is None:
        return None
    named = dict(zip(signature.names, args, strict=False)) | {_ALIASES.get(k, k): value for k, value in kwargs.items()}
    if named.get("running_mean") is None or named.get("running_var") is None:
        return None
    return NormCall(
        x=named["input"],
        weight=named["weight"],
        bias=named["bias"],
        mean=named["running_mean"],
        var=named["running_var"],
        training=bool(named.get("training", False)),
        momentum=named["momentum"],
        eps=named["eps"],
        per_instance=signature.per_instance,
        outputs=signature.outputs,
    )


@dataclass(frozen=True)
class _Signature:
    names: tuple[str, ...]
    per_instance: bool
    outputs: int


@cache
def _signature(operator: Any) -> _Signature | None:
    """Of a reader of statistics. Every operator of a model is asked, in every pass: schemas are slow to read."""
    schema = operator._schema
    if schema.name not in STATISTICS_READERS:
        return None
    names = tuple(_ALIASES.get(argument.name, argument.name) for argument in schema.arguments)
    return _Signature(names, schema.name == "aten::instance_norm", len(schema.returns))


class _NormMode(TorchDispatchMode):
    def __init__(self, on_norm: OnNorm, on_write: OnWrite) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_norm = on_norm
        self._on_write = on_write

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = read_call(func, args, kwargs)
        if call is not None and (result := self._on_norm(call)) is not None:
            return result
        if call is None and (operator := operator_of(func)).writes:
            for tensor in operator.written(args, kwargs):
                self._on_write(tensor)
        return func(*args, **kwargs)


@contextmanager
def inference(*modes: TorchDispatchMode) -> Iterator[None]:
    """Run what stands inside without autograd and below its decompositions, under `modes` (the last sees calls first).

    The state is the calling thread's alone, and ends with the context.
    """
    from contextlib import ExitStack

    # inference_mode would do, but its tensors could never be written to again: the model may keep one
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


def intercepting(on_norm: OnNorm, on_write: OnWrite) -> TorchDispatchMode:
    """A dispatch mode that calls `on_norm` at every normalisation with running statistics, and `on_write` at other operators that write."""
    return _NormMode(on_norm, on_write)
