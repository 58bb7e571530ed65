"""Which of Python's numbers are constants.

``x * 0.5`` and ``x / math.sqrt(x.shape[-1])`` look the same to a recorder, as do a padding of 1 and one that is computed from the size. A number counts as a
constant of the model where further passes, over inputs of another batch size, other spatial sizes and other values, do the same operators with the same
numbers, and nothing in the pass read the values of tensors. In an exported graph, what is written as a number is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bnctl.engines.torch.exported import written_numbers
from bnctl.engines.torch.record import READ, OpCall, Ref, TensorInfo, Trace

_ARITHMETIC = frozenset(
    f"aten.{name}{form}.Tensor" for name in ("add", "sub", "mul", "div", "rsub") for form in ("", "_")
)
_READS_OF_VALUES = {
    READ.rpartition(".")[0],
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.item",
}


def reads_of_values(trace: Trace) -> Iterator[OpCall]:
    """Operators by which Python looked at values that depend on the input."""
    for call in trace.ops:
        if call.op.rpartition(".")[0] in _READS_OF_VALUES and not set(call.inputs) <= set(trace.tensors):
            yield call


@dataclass(frozen=True)
class Others:
    """Further passes of the same model.

    Args:
        traces: on inputs that differ.
        telling: whether all differs in them that a number could be computed from: sizes, and the numbers that the model is given.
    """

    traces: tuple[Trace, ...] = ()
    telling: bool = False


class Passes:
    """The further passes of a model, made when they are first asked for, and what they say of the operators of a record.

    Args:
        trace: the record.
        others: makes them.
    """

    def __init__(self, trace: Trace, others: Callable[[], Others]) -> None:
        self._trace = trace
        self._others = others

    @cached_property
    def settled(self) -> set[int]:
        """Places of the operators whose numbers are constants, see :func:`settled_operators`."""
        return settled_operators(self._trace, self._others())

    @cached_property
    def aside(self) -> set[int]:
        """Places of the operators that run in another method than ``forward``."""
        first = self._others().traces[:1]
        return {i for trace in first for i, call in enumerate(trace.ops) if call.aside}

    def contradict(self, place: int) -> bool:
        """Whether there are further passes, and they do something else there."""
        return bool(self._others().traces) and place not in self.settled


def settle(trace: Trace, others: Callable[[], Others]) -> None:
    """Let numbers in arithmetic that no pass changes be constants: values of their own, as if they were parameters. So are those that are written in an
    exported graph.

    Args:
        trace: the record; changed in place.
        others: further passes, made where they could settle any number.
    """
    operands = list(_operands(trace))
    written = written_numbers(trace) if operands else set()
    settled: set[int] = set()
    if not written.issuperset(operands) and not any(True for _ in reads_of_values(trace)):
        settled = settled_operators(trace, others()) if others().telling else set()
    for index, position in operands:
        if index in settled or (index, position) in written:
            call = trace.ops[index]
            args = (*call.args[:position], _constant(call.args[position], trace), *call.args[position + 1 :])
            trace.ops[index] = replace(call, args=args)


def settled_operators(trace: Trace, others: Others) -> set[int]:
    """Places in the record of the operators that all passes do with the same numbers; none where the passes go different ways."""
    names = [call.op for call in trace.ops]
    if not others.traces or any([call.op for call in other.ops] != names for other in others.traces):
        return set()
    return {
        index
        for index, call in enumerate(trace.ops)
        if all(_settings(other.ops[index], {}) == _settings(call, trace.numbers) for other in others.traces)
    }


def _settings(call: OpCall, numbers: Mapping[int, int | float]) -> Any:
    """The arguments of an operator without its tensors; numbers with their types, those that have become values, too."""

    def bare(tree: Any) -> Any:
        if isinstance(tree, Ref):
            return bare(numbers[tree.value]) if tree.value in numbers else Ref
        if isinstance(tree, (tuple, list)):
            return [bare(item) for item in tree]
        if isinstance(tree, dict):
            return {key: bare(item) for key, item in tree.items()}
        if isinstance(tree, torch.ScriptObject):  # packed weights are no number, and not to be compared
            return torch.ScriptObject
        return type(tree), tree

    return bare((call.args, call.kwargs))


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
