"""Which of Python's numbers are constants.

``x * 0.5`` and ``x / math.sqrt(x.shape[-1])`` look the same to a recorder. A number counts as a constant of the model where a second pass, over inputs of
another batch size and other spatial sizes, does the same operators with the same number, and nothing in the pass read the values of tensors. Where the
model takes no other sizes, no number counts as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bnctl.engines.torch.record import OpCall, Ref, TensorInfo, Trace

_ARITHMETIC = frozenset(
    f"aten.{name}{form}.Tensor" for name in ("add", "sub", "mul", "div", "rsub") for form in ("", "_")
)
_READS_OF_VALUES = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.item"}


def reads_of_values(trace: Trace) -> Iterator[OpCall]:
    """Operators by which Python looked at values that depend on the input."""
    for call in trace.ops:
        if call.op.rpartition(".")[0] in _READS_OF_VALUES and not set(call.inputs) <= set(trace.tensors):
            yield call


def has_numbers(trace: Trace) -> bool:
    """Whether a second pass could settle anything."""
    return any(True for _ in _operands(trace)) and not any(True for _ in reads_of_values(trace))


def settle(trace: Trace, again: Trace) -> None:
    """Let numbers that did not change between two passes be constants: values of their own, as if they were parameters.

    Args:
        trace: the record; changed in place.
        again: of the same model, on inputs of other sizes.
    """
    if [call.op for call in trace.ops] != [call.op for call in again.ops]:
        return
    for index, position in list(_operands(trace)):
        call, other = trace.ops[index], again.ops[index]
        number = call.args[position]
        if type(other.args[position]) is type(number) and other.args[position] == number:
            args = (*call.args[:position], _constant(number, trace), *call.args[position + 1 :])
            trace.ops[index] = replace(call, args=args)


def _operands(trace: Trace) -> Iterator[tuple[int, int]]:
    """Operator and position of every number that takes part in arithmetic with data."""
    for index, call in enumerate(trace.ops):
        if call.op in _ARITHMETIC and not all(v in trace.tensors for v in call.inputs):
            for position, argument in enumerate(call.args[:2]):
                if isinstance(argument, (int, float)) and not isinstance(argument, bool):
                    yield index, position


def _constant(number: Any, trace: Trace) -> Ref:
    value = len(trace.info)
    trace.info.append(TensorInfo((), torch.float64))
    trace.tensors[value] = torch.tensor(number, dtype=torch.float64)
    trace.numbers[value] = number
    return Ref(value)
