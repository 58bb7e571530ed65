"""The calls of a record, found by module, by parent, by what they read."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property

from bnctl.engines.torch.record import ModuleCall, OpCall, Trace


class Calls:
    """An index of a record, which must not change afterwards.

    Args:
        trace: the record.

    Attributes:
        place: position of each operator call, by ``id``.
        of: calls of each module, by ``id``.
        children: the calls that each call made of other modules; under None those that nobody made.
        inside: the operator calls in each module call, those of its children included, in order.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.place = {id(call): number for number, call in enumerate(trace.ops)}
        self.of: dict[int, list[ModuleCall]] = defaultdict(list)
        self.children: dict[ModuleCall | None, list[ModuleCall]] = defaultdict(list)
        self.inside: dict[ModuleCall, list[OpCall]] = defaultdict(list)
        for call in trace.modules:
            self.of[id(call.module)].append(call)
            self.children[call.parent].append(call)
        for op in trace.ops:
            within: ModuleCall | None = op.within
            while within is not None:
                self.inside[within].append(op)
                within = within.parent

    def own(self, call: ModuleCall) -> list[OpCall]:
        """The operators that a module's own code ran in a call."""
        return [op for op in self.inside.get(call, ()) if op.within is call]

    @cached_property
    def readers(self) -> dict[int, list[OpCall]]:
        """The operators that read each value, once per read."""
        found: dict[int, list[OpCall]] = defaultdict(list)
        for call in self.trace.ops:
            for value in call.inputs:
                found[value].append(call)
        return found


def layer_of(call: OpCall) -> str:
    """The layer that the user knows: the path of the innermost module, or the operator's own name within the model."""
    return call.within.path or call.op.removeprefix("aten.").split(".")[0]


def join(path: str, name: str) -> str:
    """The path of something below a module; that of the model itself is empty."""
    return f"{path}.{name}" if path else name
