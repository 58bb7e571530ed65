"""The code of modules, read as programs from the record of their calls, and what can be taken out of it (decision 0008).

A program is the operators that the module's own code ran, and the calls of its children. What cannot be told from one call is not read: a number that Python
may have computed from the input (decision 0007), a tensor from outside the module, arguments that are no tensors. There is then no program, and the code
stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bnctl.engines.torch.calls import Calls, join
from bnctl.engines.torch.exported import nodes_of
from bnctl.engines.torch.hooks import watched_at_entry
from bnctl.engines.torch.numbers import Passes
from bnctl.engines.torch.program import (
    ON_PARAMETERS,
    REPLAYED,
    WITHOUT_BIAS,
    Program,
    Step,
    Stored,
    base_name,
    values_in,
)
from bnctl.engines.torch.record import ALIASED_WRITE, ModuleCall, OpCall, Ref
from bnctl.engines.torch.removal import Bypass, Splice
from bnctl.graph.graph import Node, Slot


@dataclass(frozen=True)
class Room:
    """A step of a module's program that can be given a bias: as its third argument, or, where `behind` is a number, by a sum after it, with so many axes
    behind the channels.
    """

    path: str
    step: int
    behind: int | None


class Readings:
    """Reads the code of modules when it is asked for, and keeps what an edit may need.

    Args:
        calls: of the record.
        passes: further passes: code is only read where all of them do the same.

    Attributes:
        programs: the code of modules as steps, by path.
        rooms: places for a bias in such code, by the name of the parameter that would fill them.
    """

    def __init__(self, calls: Calls, passes: Passes) -> None:
        self.calls = calls
        self.passes = passes
        self.programs: dict[str, Program] = {}
        self.rooms: dict[str, Room] = {}
        self._found: dict[ModuleCall, Reading | None] = {}
        self._nodes: dict[ModuleCall, dict[int, str]] = {}

    def splice(self, node: Node, call: OpCall) -> tuple[str, Splice | Bypass] | None:
        """How to let the code around an affine operator go on without it, and a name for that operator; None where that cannot be done."""
        info = self.calls.trace.info
        source, result = node.inputs[0], node.outputs[0]
        if info[source] != info[result]:  # nothing is left that would convert
            return None
        if isinstance(call.within.module, fx.GraphModule):
            bypass = self._bypass(call, result, source)
            return None if bypass is None else (join(bypass.path, bypass.aliases[0][0]), bypass)
        reading = self._holding(call)
        if reading is None:
            return None
        return f"{node.layer}#{reading.steps[id(call)]}", self._splice(call, reading, result, source)

    def drop(self, node: Node, index: int) -> Splice | Bypass | None:
        """How to leave an input out of a sum of two, by position; None where the code around it cannot be told, or is called more than once."""
        call, info = self.calls.trace.ops[node.id], self.calls.trace.info
        other = node.inputs[1 - index] if len(node.inputs) == 2 else None
        once = len(self.calls.of[id(call.within.module)]) == 1
        if other is None or not once or info[other] != info[node.outputs[0]]:
            return None
        if isinstance(call.within.module, fx.GraphModule):
            return self._bypass(call, node.outputs[0], other)
        reading = self._holding(call)
        return None if reading is None else self._splice(call, reading, node.outputs[0], other)

    def _bypass(self, call: OpCall, result: int, source: int) -> Bypass | None:
        within = call.within
        if within not in self._nodes:
            self._nodes[within] = (None if within.path is None else nodes_of(within, self.calls)) or {}
        names = self._nodes[within]
        if result not in names or source not in names:
            return None
        return Bypass(within.path or "", ((names[result], names[source]),))

    def _splice(self, call: OpCall, reading: Reading, result: int, source: int) -> Splice:
        path = call.within.path or ""
        self.programs[path] = reading.program
        return Splice(path, ((reading.numbers[result], reading.numbers[source]),))

    def room(self, call: OpCall, behind: int) -> Slot | None:
        """An empty slot for the bias of a linear operator with so many axes behind its channels; None where the code around it cannot be told."""
        reading, path = self._holding(call), call.within.path
        if reading is None or path is None:
            return None
        step = reading.steps[id(call)]
        name = f"bias_{step}"
        if hasattr(call.within.module, name):
            return None
        self.programs[path] = reading.program
        self.rooms[join(path, name)] = Room(path, step, behind if base_name(call.op) in WITHOUT_BIAS else None)
        return Slot(join(path, name), None)

    def _holding(self, call: OpCall) -> Reading | None:
        """The code that an operator ran in, where it can be read and the operator is a step of it."""
        reading = self._of(call.within)
        return reading if reading is not None and id(call) in reading.steps else None

    def _of(self, call: ModuleCall) -> Reading | None:
        """The code of a module as steps; None where it cannot be read, or differs from call to call."""
        if call not in self._found:
            every = self.calls.of[id(call.module)]
            found = {each: self._read(each) for each in every}
            programs = [None if reading is None else reading.program for reading in found.values()]
            same = bool(programs) and all(program == programs[0] for program in programs)
            self._found |= found if same else dict.fromkeys(every)
        return self._found.get(call)

    def _read(self, call: ModuleCall) -> Reading | None:
        places = {self.calls.place[id(c)] for c in self.calls.own(call)}
        if not places <= self.passes.settled or places & self.passes.aside:
            return None
        return read(call, self.calls)


@dataclass(frozen=True)
class Reading:
    """A program, the number that each value of the record has in it, and the number of the step that each operator call is."""

    program: Program
    numbers: Mapping[int, int]
    steps: Mapping[int, int]


def read(call: ModuleCall, calls: Calls) -> Reading | None:
    """The program of a module call, or None where there is none."""
    if call.path is None or call.kwargs or not call.args or not all(isinstance(a, Ref) for a in call.args):
        return None
    if isinstance(call.module, fx.GraphModule):
        return None  # its copies are made from its graph, and know nothing of another forward
    if watched_at_entry(call.module) or any(c.module._forward_hooks for c in calls.children[call]):
        return None  # what a hook does would be done twice: by the hook and by the steps
    return _Reader(call, calls).read()


class _Reader:
    def __init__(self, call: ModuleCall, calls: Calls) -> None:
        self.call, self.calls, self.trace = call, calls, calls.trace
        self.prefix = join(call.path or "", "")
        self.numbers: dict[int, int] = {a.value: i for i, a in enumerate(call.args)}
        self.count = len(call.args)

    def read(self) -> Reading | None:
        own, children = self.calls.own(self.call), self.calls.children[self.call]
        order: list[tuple[int, int, OpCall | ModuleCall]] = [(c.start, 0, c) for c in children]
        order += [(self.calls.place[id(op)], 1, op) for op in own]
        steps: list[Step] = []
        number_of: dict[int, int] = {}
        for _, _, called in sorted(order, key=lambda entry: entry[:2]):
            step = self._operator(called) if isinstance(called, OpCall) else self._child(called)
            if step is None:
                return None
            number_of[id(called)] = len(steps)
            steps.append(step)
        # What a hook inside a child keeps, it will keep again; what else is kept, the module's own code keeps.
        made = {v for c in children for v in c.outputs if not any(m._forward_hooks for m in c.module.modules())}
        made |= {v for c in own for v in c.outputs}
        result = self._tree(self.call.result, numbers=False)
        if result is None or (made - set(self.call.outputs)) & self.trace.held or not set(values_in(result)):
            return None
        return Reading(Program(len(self.call.args), tuple(steps), result[0]), self.numbers, number_of)

    def _operator(self, op: OpCall) -> Step | None:
        name = base_name(op.op)
        on_parameters = all(v in self.trace.tensors for v in (*op.inputs, *op.outputs))
        known = name in REPLAYED or (on_parameters and name in ON_PARAMETERS)
        if op.op == ALIASED_WRITE or op.random or not known or (op.writes and len(op.outputs) != 1):
            return None
        args, kwargs = self._tree(op.args, numbers=True), self._tree(op.kwargs, numbers=True)
        return None if args is None or kwargs is None else self._step(op.op, False, args[0], kwargs[0], op.outputs)

    def _innermost(self, child: ModuleCall) -> ModuleCall:
        """The one layer that a child calls, where it does nothing else: what surgery leaves of a layer and its normalisation."""
        while not self.calls.own(child) and not watched_at_entry(child.module):
            inner = [c for c in self.calls.children[child] if type(c.module) is not nn.Identity]
            if len(inner) != 1 or inner[0].path is None or any(m._forward_hooks for m in child.module.modules()):
                break
            if (inner[0].args, inner[0].kwargs, inner[0].result) != (child.args, child.kwargs, child.result):
                break
            child = inner[0]
        return child

    def _child(self, child: ModuleCall) -> Step | None:
        child = self._innermost(child)
        if child.path is None or not child.path.startswith(self.prefix):
            return None
        args, kwargs = self._tree(child.args, numbers=False), self._tree(child.kwargs, numbers=False)
        if args is None or kwargs is None:
            return None
        return self._step(child.path.removeprefix(self.prefix), True, args[0], kwargs[0], tuple(child.outputs))

    def _step(self, name: str, child: bool, args: Any, kwargs: Any, outputs: Sequence[int]) -> Step:
        made = range(self.count, self.count + len(outputs))
        self.count += len(outputs)
        self.numbers.update(zip(outputs, made, strict=True))
        return Step(name, child, args, tuple(sorted(kwargs.items())), tuple(made))

    def _tree(self, tree: Any, *, numbers: bool) -> tuple[Any] | None:
        """Recorded arguments in the program's terms, in a tuple of one; None where something in them cannot be told."""
        if isinstance(tree, Ref):
            if tree.value in self.numbers:
                return (Ref(self.numbers[tree.value]),)
            if tree.value in self.trace.numbers:
                return (self.trace.numbers[tree.value],)
            names = [n for n in self.trace.parameters.get(tree.value, ()) if n.startswith(self.prefix)]
            return (Stored(names[0].removeprefix(self.prefix)),) if names else None
        if isinstance(tree, (tuple, list)):
            items = [self._tree(item, numbers=numbers) for item in tree]
            return None if None in items else ((tuple if isinstance(tree, tuple) else list)(i[0] for i in items if i),)
        if isinstance(tree, dict):
            entries = {key: self._tree(item, numbers=numbers) for key, item in tree.items()}
            return None if None in entries.values() else ({k: v[0] for k, v in entries.items() if v},)
        plain = tree is None or isinstance(tree, (bool, str)) or (numbers and isinstance(tree, (int, float)))
        return (tree,) if plain else None
