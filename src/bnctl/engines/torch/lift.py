"""From a recorded forward pass to the normalised graph.

Operators are translated by the table in :mod:`bnctl.engines.torch.translate`; this file resolves values, parameters and layers around it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnctl.codes import Obstacle
from bnctl.engines.torch.bake import Bake, bake, watched_at_entry
from bnctl.engines.torch.layers import inserted_norm
from bnctl.engines.torch.numbers import Others, settled_operators
from bnctl.engines.torch.program import Program, Reading, read
from bnctl.engines.torch.record import ALIASED_WRITE, ModuleCall, OpCall, Ref, Trace
from bnctl.engines.torch.removal import Head, Removal, Splice, analyse
from bnctl.engines.torch.translate import PARAMETER_ARGUMENTS, Operands, Translated, translate
from bnctl.engines.torch.translate.table import argument
from bnctl.graph import ops
from bnctl.graph.graph import Graph, Node, Slot, Value

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Lifted:
    """The graph of a torch model, and the way back.

    Args:
        graph: the normalised graph.
        removals: how to take out each affine layer, by layer name.
        programs: the code of modules as steps, by path, where a layer can only be taken out of that.
        rooms: empty arguments of operators in such code, by the name of the parameter that would fill them.
        bakes: plain layers for those that compute their weight, by path.
        shown: the modules whose output each value is.
        drop: how to leave an input out of a sum of two, by position; None where the code around it cannot be told.
    """

    graph: Graph
    removals: dict[str, Removal | Splice]
    programs: dict[str, Program]
    rooms: dict[str, Room]
    bakes: dict[str, Bake]
    shown: dict[int, tuple[str, ...]]
    drop: Callable[[Node, int], Splice | None]


@dataclass(frozen=True)
class Room:
    """An empty argument of a step of a module's program."""

    path: str
    step: int
    position: int


def to_numpy(tensor: Tensor) -> Array:
    """Any float tensor as float64 on the CPU."""
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()


def lift(trace: Trace, others: Callable[[], Others] = Others) -> Lifted:
    """Translate a trace; ``others`` are further passes of the model, made when they are asked for."""
    return _Lifter(trace, others).lift()


_VIEWS = {"aten.view.default", "aten.view_as.default"}
"""Reshapes that never copy."""

_PADS = re.compile(r"aten\.(pad|constant_pad_nd|conv\w*|avg_pool\dd)\.")
"""Operators that may pad by numbers that were computed from a size."""


class _Lifter(Operands):
    def __init__(self, trace: Trace, others: Callable[[], Others]) -> None:
        self.trace = trace
        self.others = others
        self.arrays: dict[int, Array] = {}
        self.numbers = {id(call): number for number, call in enumerate(trace.ops)}
        self.inner = _ops_within(trace)
        self.analyses: dict[ModuleCall, tuple[Head, Removal] | None] = {}
        self.calls: dict[int, list[ModuleCall]] = defaultdict(list)
        for call in trace.modules:
            self.calls[id(call.module)].append(call)
        self.children: dict[ModuleCall | None, list[ModuleCall]] = defaultdict(list)
        for call in trace.modules:
            self.children[call.parent].append(call)
        self.readings: dict[ModuleCall, Reading | None] = {}
        self.programs: dict[str, Program] = {}
        self.rooms: dict[str, Room] = {}
        self.bakes: dict[str, Bake] = {}
        self.foreign_reads = self._reads_outside_slots()

    # What the translation table asks for.

    def constant(self, item: Any) -> Array | None:
        """The value of a tensor that derives from parameters alone; None for anything that may depend on the input.

        A plain number may: ``x / math.sqrt(x.shape[-1])`` and ``x * 0.5`` look the same to the dispatcher.
        """
        if isinstance(item, Ref) and item.value in self.trace.tensors:
            if item.value not in self.arrays:
                tensor = self.trace.tensors[item.value]
                if not tensor.is_floating_point() and tensor.dtype not in {torch.int32, torch.int64}:
                    return None
                self.arrays[item.value] = to_numpy(tensor)
            return self.arrays[item.value]
        return None

    def is_data(self, item: Any) -> bool:
        """Whether an argument is a tensor that may depend on the model's input."""
        return isinstance(item, Ref) and item.value not in self.trace.tensors

    def shape(self, item: Any) -> tuple[int, ...]:
        """Sizes of a tensor argument."""
        return self.trace.info[item.value].shape if isinstance(item, Ref) else ()

    def weight(self, item: Any, call: OpCall) -> Slot | None:
        """The slot of a weight, or None where the weight depends on the input."""
        if not isinstance(item, Ref) or item.value not in self.trace.tensors:
            return None
        names = self.trace.parameters.get(item.value)
        shape = self.shape(item)
        if names is None:
            tensor = f"computed:{item.value}"
            baked = self._baked(call)
            if baked is not None:
                name = "weight" if item == argument(call, 1) else "bias"
                return Slot(f"{baked.path}.{name}", shape, tensor)
            kind = Obstacle("BN108", f"the weight of {self.layer(call)} is computed in every pass")
            return Slot(tensor, shape, obstacle=kind)
        prefix = f"{call.within.path}." if call.within.path else ""
        key = next(
            (n for n in names if n.rpartition(".")[0] == (call.within.path or "") and n.startswith(prefix)), names[0]
        )
        obstacle = None
        if item.value in self.foreign_reads:
            obstacle = Obstacle("BN106", f"{key} is also read by {self.foreign_reads[item.value]}")
        return Slot(key, shape, names[0], obstacle, shared=len(names) > 1)

    def bias(self, item: Any, weight: Slot | None, call: OpCall) -> Slot | None:
        """The slot of a bias; an empty one where the layer is a plain module without bias; None where there is no room for one."""
        if weight is not None and weight.tensor.startswith(
            "computed:"
        ):  # the plain layer in its place has a bias, or room for one
            key = f"{weight.key.rpartition('.')[0]}.bias"
            known = isinstance(item, Ref) and item.value in self.trace.tensors
            if weight.obstacle or (item is not None and not known):
                return None
            return Slot(key, None) if item is None else Slot(key, self.shape(item), f"computed:{item.value}")
        if item is not None:
            return self.weight(item, call)
        module, path = call.within.module, call.within.path
        plain = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and getattr(module, "bias", 0) is None
        if weight is None or path is None:
            return None
        if plain and weight.key == _join(path, "weight"):
            return Slot(_join(path, "bias"), None)
        reading = self._reading(call.within)
        if reading is None or id(call) not in reading.steps:
            return None
        step = reading.steps[id(call)]
        name = f"bias_{step}"
        if hasattr(module, name):
            return None
        self.programs[path] = reading.program
        self.rooms[_join(path, name)] = Room(path, step, 2)
        return Slot(_join(path, name), None)

    def layer(self, call: OpCall) -> str:
        """The layer that the user knows: the path of the innermost module, or the operator's own name within the model."""
        return call.within.path or call.op.removeprefix("aten.").split(".")[0]

    # The way through the trace.

    def lift(self) -> Lifted:
        nodes: list[Node] = []
        removals: dict[str, Removal | Splice] = {}
        swallowed: set[int] = set()
        for call in self.trace.ops:
            number = self.numbers[id(call)]
            if number in swallowed or (call.outputs and all(v in self.trace.tensors for v in call.outputs)):
                continue
            node = self._node(call)
            if isinstance(node.op, ops.Affine):
                node, parts = self._layer_of(node, call, removals)
                node = replace(node, obstacle=node.obstacle or self._needs_memory(node))
                swallowed |= parts
                while nodes and nodes[-1].id in parts:  # the reshapes before the affine operator
                    nodes.pop()
            nodes.append(node)
        graph = Graph(
            tuple(nodes),
            self._values(nodes),
            tuple(self.trace.inputs),
            tuple(self.trace.outputs),
            type(self.trace.root).__name__,
        )
        return Lifted(graph, removals, self.programs, self.rooms, self.bakes, self._shown(), self._dropped)

    def _node(self, call: OpCall) -> Node:
        number = self.numbers[id(call)]
        if call.op == ALIASED_WRITE:
            written = Obstacle("BN117", f"it is written through a view in {self.layer(call)}")
            return Node(number, ops.Opaque("a write in place", written), self.layer(call), call.inputs, call.outputs)
        found = translate(call, self) if self._is_settled(call) else None
        found = found or Translated(ops.Opaque(call.op))
        read = call.inputs if found.reads is None else tuple(call.args[i].value for i in found.reads)
        data = tuple(v for v in read if v not in self.trace.tensors)
        name = self._owner_of_statistics(call) if isinstance(found.op, ops.Norm) and found.op.obstacle else None
        obstacle = self._no_layer_of_its_own(call) if isinstance(found.op, ops.LinearOp) else None
        in_place = call.writes and not isinstance(found.op, ops.Identity)
        slots = (found.weight, found.bias)
        return Node(number, found.op, name or self.layer(call), data, call.outputs, *slots, obstacle, in_place)

    @cached_property
    def settled(self) -> set[int]:
        """Places of the operators whose numbers are constants."""
        return settled_operators(self.trace, self.others())

    @cached_property
    def aside(self) -> set[int]:
        """Places of the operators that run in another method than ``forward``."""
        first = self.others().traces[:1]
        return {i for trace in first for i, call in enumerate(trace.ops) if call.aside}

    def _is_settled(self, call: OpCall) -> bool:
        """Whether the numbers that a rule rests on are constants; those of torch's own layers are."""
        own = type(call.within.module).__module__.startswith("torch.nn.") or isinstance(
            call.within.module, nn.modules.conv._ConvNd
        )
        if own or not _PADS.match(call.op):
            return True
        return not self.others().traces or self.numbers[id(call)] in self.settled

    def _layer_of(self, node: Node, call: OpCall, removals: dict[str, Removal | Splice]) -> tuple[Node, set[int]]:
        """The affine layer that an affine operator belongs to, as one node, and the operators that it consists of."""
        within = call.within
        found = self._analysed(within)
        hooked = _hooked(within.module) or within.module._forward_pre_hooks
        whole_obstacle = Obstacle("BN107", f"{within.path} has a hook") if hooked and within.path else None
        if found is None or call not in found[0].calls:
            place = within.path or "the model itself"
            spliced = self._spliced(node, call, removals)
            if spliced is not None:
                return spliced, set()
            obstacle = whole_obstacle or Obstacle(
                "BN109", f"computed in the forward of {place}, which also does other things"
            )
            name = self._owner_of_statistics(call) or f"{node.layer}#{node.id}"
            return replace(node, layer=name, obstacle=obstacle), set()
        head, removal = found
        assert isinstance(node.op, ops.Affine)
        single = len(head.calls) == 1
        op = replace(node.op, map=head.map, norm=node.op.norm or _is_norm(within.module))
        removals[removal.path] = removal
        if any((other := self._analysed(c)) is None or other[1] != removal for c in self.calls[id(within.module)]):
            whole_obstacle = Obstacle("BN109", f"{removal.path} does different things in different calls")
        slots = (node.weight, node.bias) if single else (None, None)
        whole = Node(node.id, op, removal.path, (head.source,), (head.result,), *slots, whole_obstacle, node.in_place)
        return whole, {self.numbers[id(c)] for c in head.calls}

    def _spliced(self, node: Node, call: OpCall, removals: dict[str, Removal | Splice]) -> Node | None:
        """The node as a layer that can be taken out of the code around it; None where it cannot."""
        reading = self._reading(call.within)
        before, after = self.trace.info[node.inputs[0]], self.trace.info[node.outputs[0]]
        if reading is None or id(call) not in reading.steps or before != after:  # nothing is left that would convert
            return None
        path = call.within.path or ""
        step = reading.steps[id(call)]
        name = self._owner_of_statistics(call) or f"{node.layer}#{step}"
        alias = (reading.numbers[node.outputs[0]], reading.numbers[node.inputs[0]])
        known = removals.get(name, Splice(path, ()))
        if not isinstance(known, Splice) or known.path != path:
            return None
        self.programs[path] = reading.program
        removals[name] = Splice(path, tuple(dict.fromkeys((*known.aliases, alias))))
        return replace(node, layer=name)

    def _dropped(self, node: Node, index: int) -> Splice | None:
        call = self.trace.ops[node.id]
        reading = self._reading(call.within)
        other = node.inputs[1 - index] if len(node.inputs) == 2 else None
        if reading is None or id(call) not in reading.steps or other is None:
            return None
        if len(self.calls[id(call.within.module)]) != 1 or self.trace.info[other] != self.trace.info[node.outputs[0]]:
            return None
        path = call.within.path or ""
        self.programs[path] = reading.program
        return Splice(path, ((reading.numbers[node.outputs[0]], reading.numbers[other]),))

    def _reading(self, call: ModuleCall) -> Reading | None:
        """The code of a module as steps; None where it cannot be read, or differs from call to call."""
        if call not in self.readings:
            for each in self.calls[id(call.module)]:
                own = [c for c in self.inner.get(each, ()) if c.within is each]
                places = {self.numbers[id(c)] for c in own}
                plain = places <= self.settled and not places & self.aside
                self.readings[each] = read(each, own, self.children[each], self.numbers, self.trace) if plain else None
            found = [self.readings[each] for each in self.calls[id(call.module)]]
            programs = [None if reading is None else reading.program for reading in found]
            if not programs or any(program != programs[0] for program in programs):
                self.readings |= dict.fromkeys(self.calls[id(call.module)])
        return self.readings.get(call)

    def _baked(self, call: OpCall) -> Bake | None:
        """The plain layer in the place of one that computes its weight; all calls must agree."""
        path = call.within.path
        if path is None or self._read_elsewhere(path):
            return None
        if path not in self.bakes:
            found = []
            for each in self.calls[id(call.within.module)]:
                inside = self.inner.get(each, [])
                linear = [c for c in inside if c.op == call.op]
                found.append(bake(each, linear[0], inside, self.trace) if len(linear) == 1 else None)
            first = found[0]
            if first is None or any(
                f is None or f.args != first.args or not f.weight.equal(first.weight) for f in found
            ):
                return None
            self.bakes[path] = first
        return self.bakes[path]

    def _read_elsewhere(self, path: str) -> bool:
        """Whether code outside a module reads its parameters by no other name than the module's own."""
        for call in self.trace.ops:
            where = call.within.path or ""
            if where == path or where.startswith(f"{path}."):
                continue
            for value in call.inputs:
                names = self.trace.parameters.get(value, ())
                if names and all(n.startswith(f"{path}.") for n in names):
                    return True
        given = {v for call in self.trace.modules for v in call.outputs} | set(self.trace.outputs)
        return any(n.startswith(f"{path}.") for v in given for n in self.trace.parameters.get(v, ()))

    def _shown(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, list[str]] = defaultdict(list)
        for call in self.trace.modules:
            for value in call.outputs:
                found[value].append(call.path or "")
        return {value: tuple(paths) for value, paths in found.items()}

    def _needs_memory(self, node: Node) -> Obstacle | None:
        """Whether something behind a layer works only because its result lies in memory of its own, in the usual order."""
        before, after = (self.trace.info[v].strides for v in (node.inputs[0], node.outputs[0]))
        if before == after:
            return None
        todo, seen = [node.outputs[0]], set[int]()
        while todo:
            value = todo.pop()
            for call in self.readers_of[value]:
                if call.op in _VIEWS or (call.writes and 0 in before):
                    return Obstacle(
                        "BN123", f"{call.op} in {self.layer(call)} needs the memory that {node.layer} makes"
                    )
                for made in call.outputs:
                    same = self.trace.info[made] == self.trace.info[value]
                    if same and made not in seen:
                        seen.add(made)
                        todo.append(made)
        return None

    @cached_property
    def readers_of(self) -> dict[int, list[OpCall]]:
        """The operators that read each value."""
        found: dict[int, list[OpCall]] = defaultdict(list)
        for call in self.trace.ops:
            for value in call.inputs:
                found[value].append(call)
        return found

    def _analysed(self, call: ModuleCall) -> tuple[Head, Removal] | None:
        if call not in self.analyses:
            self.analyses[call] = analyse(call, self.inner.get(call, []), self._node, self.trace) if call.path else None
        return self.analyses[call]

    def _no_layer_of_its_own(self, call: OpCall) -> Obstacle | None:
        """Whether a norm can be hung behind a linear operator: its output must be the output of a module that stores its weight."""
        within = call.within
        if (
            within.path is not None
            and within.outputs == list(call.outputs)
            and "weight" in dict(within.module.named_parameters(recurse=False))
        ):
            return None
        return Obstacle("BN206", f"{call.op} is computed in the forward of {within.path or 'the model itself'}")

    def _owner_of_statistics(self, call: OpCall) -> str | None:
        """The module that owns the running mean of a BatchNorm, wherever it is computed."""
        refs = [item for item in call.args if isinstance(item, Ref)]
        names = [
            name for item in refs for name in self.trace.parameters.get(item.value, ()) if name.endswith("running_mean")
        ]
        return names[0].rpartition(".")[0] if names else None

    def _reads_outside_slots(self) -> dict[int, str]:
        """Parameters that some operator reads in a way that no slot covers: they must keep their values."""
        found: dict[int, str] = {}
        for call in self.trace.ops:
            own = {
                call.args[i]
                for i in PARAMETER_ARGUMENTS.get(call.op, ())
                if i < len(call.args) and isinstance(call.args[i], Ref)
            }
            for value in call.inputs:
                if value in self.trace.parameters and Ref(value) not in own:
                    found[value] = f"{call.op} in {self.layer(call)}"
        return found

    def _values(self, nodes: list[Node]) -> dict[int, Value]:
        observed: dict[int, Obstacle] = {}
        for value in self.trace.held:
            observed[value] = Obstacle("BN107", "the tensor is kept after the pass, by a hook or an attribute")
        for call in self.trace.modules:
            seen = (*call.inputs, *(call.outputs if _hooked(call.module) else ()))
            if _hooked(call.module) or watched_at_entry(call.module):
                for value in seen:
                    observed[value] = Obstacle("BN107", f"a hook of {call.path} sees it")
        for value in self.trace.outputs:
            observed[value] = Obstacle("BN102", "it is an output of the model")
        names = {v: f"the output of {n.layer}" for n in nodes for v in n.outputs}
        names |= dict.fromkeys(self.trace.inputs, "the input")
        used = {v for n in nodes for v in (*n.inputs, *n.outputs)} | set(self.trace.inputs) | set(self.trace.outputs)
        info = self.trace.info
        return {
            v: Value(
                v, names.get(v, f"value {v}"), info[v].shape, str(info[v].dtype).removeprefix("torch."), observed.get(v)
            )
            for v in sorted(used)
        }


def _ops_within(trace: Trace) -> dict[ModuleCall, list[OpCall]]:
    """Operator calls in each module call, those of its children included, in order."""
    found: dict[ModuleCall, list[OpCall]] = defaultdict(list)
    for call in trace.ops:
        within: ModuleCall | None = call.within
        while within is not None:
            found[within].append(call)
            within = within.parent
    return found


def _hooked(module: nn.Module) -> bool:
    """Whether hooks see the output, or its gradient: those that bnctl put there itself apart."""
    ours = inserted_norm(module) is not None
    forward = len(module._forward_hooks) - (1 if ours else 0)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or "norm" in type(module).__name__.lower()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
