"""From a recorded forward pass to the normalised graph.

Operators are translated by the table in :mod:`bnctl.engines.torch.translate`; this file resolves values, parameters and layers around it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnctl.codes import Obstacle
from bnctl.engines.torch.bake import Bake, Bakes
from bnctl.engines.torch.calls import Calls, join, layer_of
from bnctl.engines.torch.hooks import hooked, observed
from bnctl.engines.torch.layers import INSERTED, inserted_norm
from bnctl.engines.torch.numbers import Others, Passes
from bnctl.engines.torch.program import Program
from bnctl.engines.torch.readings import Readings, Room
from bnctl.engines.torch.record import ALIASED_WRITE, ModuleCall, OpCall, Ref, Trace
from bnctl.engines.torch.removal import Bypass, Head, Removal, Splice, analyse
from bnctl.engines.torch.strides import needs_memory
from bnctl.engines.torch.translate import Operands, Translated, translate
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
        rooms: places for a bias in such code, by the name of the parameter that would fill them.
        bakes: plain layers for those that compute their weight, by path.
        shown: the modules whose output each value is.
        drop: how to leave an input out of a sum of two, by position; None where the code around it cannot be told.
    """

    graph: Graph
    removals: dict[str, Removal | Splice | Bypass]
    programs: dict[str, Program]
    rooms: dict[str, Room]
    bakes: dict[str, Bake]
    shown: dict[int, tuple[str, ...]]
    drop: Callable[[Node, int], Splice | Bypass | None]


def to_numpy(tensor: Tensor) -> Array:
    """Any float tensor as float64 on the CPU."""
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()


def stored(tensor: Tensor) -> NDArray[Any]:
    """A float tensor on the CPU as it is, without a copy where numpy knows its type: arithmetic with float64 widens it piece by piece."""
    known = tensor.dtype in {torch.float16, torch.float32}
    return tensor.detach().cpu().numpy() if known else to_numpy(tensor)


def lift(trace: Trace, others: Callable[[], Others] = Others) -> Lifted:
    """Translate a trace; ``others`` are further passes of the model, made when they are asked for."""
    return _Lifter(trace, others).lift()


_CASTS = {"aten.to.dtype", "aten._to_copy.default"}

_PADS = re.compile(r"aten\.(pad|constant_pad_nd|conv\w*|avg_pool\dd)\.")
"""Operators that may pad by numbers that were computed from a size."""


class _Lifter(Operands):
    def __init__(self, trace: Trace, others: Callable[[], Others]) -> None:
        self.trace = trace
        self.calls = Calls(trace)
        self.passes = Passes(trace, others)
        self.readings = Readings(self.calls, self.passes)
        self.bakes = Bakes(self.calls)
        self.arrays: dict[int, Array] = {}
        self.analyses: dict[ModuleCall, tuple[Head, Removal] | None] = {}
        self.removals: dict[str, Removal | Splice | Bypass] = {}
        self.casts = {
            c.outputs[0]: c.inputs[0] for c in trace.ops if c.op in _CASTS and c.inputs[0] in trace.parameters
        }
        """Parameters in another type, by value: what autocast makes of them in every pass."""

    # What the translation table asks for.

    def constant(self, item: Any) -> Array | None:
        """The value of a tensor that derives from parameters alone; None for anything that may depend on the input.

        A plain number may depend on it, unless it is settled (:mod:`bnctl.engines.torch.numbers`): ``x / math.sqrt(x.shape[-1])`` and ``x * 0.5`` look
        the same to the dispatcher.
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
            if item.value in self.casts:
                # To fold into the parameter would cost what the cast loses, and could not be told from an error.
                dtype = str(self.trace.info[item.value].dtype).removeprefix("torch.")
                cast = f"{layer_of(call)} casts its weight to {dtype} in every pass (autocast, perhaps)"
                return Slot(tensor, shape, obstacle=Obstacle("BN108", cast))
            baked = self.bakes.of(call)
            if baked is not None:
                name = "weight" if item == argument(call, 1) else "bias"
                return Slot(f"{baked.path}.{name}", shape, tensor)
            kind = Obstacle("BN108", f"the weight of {layer_of(call)} is computed in every pass")
            return Slot(tensor, shape, obstacle=kind)
        prefix = f"{call.within.path}." if call.within.path else ""
        key = next(
            (n for n in names if n.rpartition(".")[0] == (call.within.path or "") and n.startswith(prefix)), names[0]
        )
        return Slot(key, shape, names[0], places=len(names))

    def bias(self, item: Any, weight: Slot | None, call: OpCall, behind: int = 0) -> Slot | None:
        """The slot of a bias; an empty one where the layer is a plain module without bias; None where there is no room for one."""
        if weight is not None and weight.tensor.startswith("computed:"):
            # The plain layer in its place has a bias, or room for one.
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
        if plain and weight.key == join(path, "weight"):
            return Slot(join(path, "bias"), None)
        return self.readings.room(call, behind)

    # The way through the trace.

    def lift(self) -> Lifted:
        nodes: list[Node] = []
        swallowed: set[int] = set()
        for number, call in enumerate(self.trace.ops):
            if number in swallowed or (call.outputs and all(v in self.trace.tensors for v in call.outputs)):
                continue
            node = self._node(call)
            if isinstance(node.op, ops.Affine):
                node, parts = self._layer_of(node, call)
                node = replace(node, obstacle=node.obstacle or needs_memory(node, self.calls))
                swallowed |= parts
                while nodes and nodes[-1].id in parts:  # the reshapes before the affine operator
                    nodes.pop()
            nodes.append(node)
        ends = (tuple(self.trace.inputs), tuple(self.trace.outputs))
        graph = Graph(self._with_other_reads(nodes), self._values(nodes), *ends, type(self.trace.root).__name__)
        found = self.readings
        shown = _shown(self.trace)
        return Lifted(graph, self.removals, found.programs, found.rooms, self.bakes.found, shown, found.drop)

    def _node(self, call: OpCall) -> Node:
        number = self.calls.place[id(call)]
        if call.op == ALIASED_WRITE:
            written = Obstacle("BN117", f"it is written through a view in {layer_of(call)}")
            return Node(number, ops.Opaque("a write in place", written), layer_of(call), call.inputs, call.outputs)
        found = translate(call, self) if self._is_settled(call) else None
        found = found or Translated(ops.Opaque(call.op))
        read = call.inputs if found.reads is None else tuple(call.args[i].value for i in found.reads)
        data = tuple(v for v in read if v not in self.trace.tensors)
        name = self._owner_of_statistics(call) if isinstance(found.op, ops.Norm) and found.op.obstacle else None
        obstacle = self._no_layer_of_its_own(call) if isinstance(found.op, ops.LinearOp) else None
        in_place = call.writes and not isinstance(found.op, ops.Identity)
        slots = (found.weight, found.bias)
        return Node(number, found.op, name or layer_of(call), data, call.outputs, *slots, obstacle, in_place)

    def _is_settled(self, call: OpCall) -> bool:
        """Whether the numbers that a rule rests on are constants; those of torch's own layers are."""
        own = type(call.within.module).__module__.startswith("torch.nn.") or isinstance(
            call.within.module, nn.modules.conv._ConvNd
        )
        return own or not _PADS.match(call.op) or not self.passes.contradict(self.calls.place[id(call)])

    def _layer_of(self, node: Node, call: OpCall) -> tuple[Node, set[int]]:
        """The affine layer that an affine operator belongs to, as one node, and the operators that it consists of."""
        within = call.within
        found = self._analysed(within)
        watched = hooked(within.module) or within.module._forward_pre_hooks
        whole_obstacle = Obstacle("BN107", f"{within.path} has a hook") if watched and within.path else None
        if found is None or call not in found[0].calls:
            place = within.path or "the model itself"
            spliced = self._spliced(node, call)
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
        self.removals[removal.path] = removal
        if any((other := self._analysed(c)) is None or other[1] != removal for c in self.calls.of[id(within.module)]):
            whole_obstacle = Obstacle("BN109", f"{removal.path} does different things in different calls")
        slots = (node.weight, node.bias) if single else (None, None)
        whole = Node(node.id, op, removal.path, (head.source,), (head.result,), *slots, whole_obstacle, node.in_place)
        return whole, {self.calls.place[id(c)] for c in head.calls}

    def _spliced(self, node: Node, call: OpCall) -> Node | None:
        """The node as a layer that can be taken out of the code around it; None where it cannot."""
        found = self.readings.splice(node, call)
        if found is None:
            return None
        given, splice = found
        name = self._owner_of_statistics(call) or given
        known = self.removals.get(name, splice)
        if isinstance(known, Removal) or type(known) is not type(splice) or known.path != splice.path:
            return None
        self.removals[name] = replace(splice, aliases=tuple(dict.fromkeys((*known.aliases, *splice.aliases))))  # type: ignore[arg-type]
        return replace(node, layer=name)

    def _analysed(self, call: ModuleCall) -> tuple[Head, Removal] | None:
        if call not in self.analyses:
            self.analyses[call] = (
                analyse(call, self.calls.inside.get(call, []), self._node, self.trace) if call.path else None
            )
        return self.analyses[call]

    def _no_layer_of_its_own(self, call: OpCall) -> Obstacle | None:
        """Whether a norm can be hung behind a linear operator: its output must be the output of a module that stores its weight."""
        within = call.within
        stored = "weight" in dict(within.module.named_parameters(recurse=False))
        if within.path is not None and not stored and isinstance(within.module, (nn.modules.conv._ConvNd, nn.Linear)):
            return Obstacle("BN108", f"the weight of {within.path} is computed in every pass")
        if within.path is not None and within.outputs == list(call.outputs) and stored:
            own = hasattr(within.module, INSERTED) and inserted_norm(within.module) is None
            return Obstacle("BN206", f"{within.path} has a {INSERTED!r} of its own") if own else None
        return Obstacle("BN206", f"{call.op} is computed in the forward of {within.path or 'the model itself'}")

    def _owner_of_statistics(self, call: OpCall) -> str | None:
        """The module that owns the running mean of a BatchNorm, wherever it is computed."""
        refs = [item for item in call.args if isinstance(item, Ref)]
        names = [
            name for item in refs for name in self.trace.parameters.get(item.value, ()) if name.endswith("running_mean")
        ]
        return names[0].rpartition(".")[0] if names else None

    def _with_other_reads(self, nodes: list[Node]) -> tuple[Node, ...]:
        """The nodes, with an obstacle in the slots of parameters that somebody reads otherwise than through a slot: they must keep their values."""
        through = {node.id: {slot.tensor for slot in (node.weight, node.bias) if slot is not None} for node in nodes}
        returned = (self.trace.parameters.get(value) for value in self.trace.outputs)
        elsewhere = {names[0]: "whoever calls the model, which returns it" for names in returned if names}
        for place, call in enumerate(self.trace.ops):
            for value in call.inputs:
                names = self.trace.parameters.get(value)
                if names is not None and names[0] not in through.get(place, ()):
                    elsewhere[names[0]] = f"{call.op} in {layer_of(call)}"

        def seen(slot: Slot | None) -> Slot | None:
            if slot is None or slot.obstacle is not None or slot.tensor not in elsewhere:
                return slot
            return replace(slot, obstacle=Obstacle("BN106", f"{slot.key} is also read by {elsewhere[slot.tensor]}"))

        slots = [(seen(node.weight), seen(node.bias)) for node in nodes]
        return tuple(
            node if (weight, bias) == (node.weight, node.bias) else replace(node, weight=weight, bias=bias)
            for node, (weight, bias) in zip(nodes, slots, strict=True)
        )

    def _values(self, nodes: list[Node]) -> dict[int, Value]:
        seen = observed(self.trace)
        names = {v: f"the output of {n.layer}" for n in nodes for v in n.outputs}
        names |= dict.fromkeys(self.trace.inputs, "the input")
        used = {v for n in nodes for v in (*n.inputs, *n.outputs)} | set(self.trace.inputs) | set(self.trace.outputs)
        info = self.trace.info
        return {
            v: Value(
                v, names.get(v, f"value {v}"), info[v].shape, str(info[v].dtype).removeprefix("torch."), seen.get(v)
            )
            for v in sorted(used)
        }


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or "norm" in type(module).__name__.lower()


def _shown(trace: Trace) -> dict[int, tuple[str, ...]]:
    """The modules whose output each value is."""
    found: dict[int, list[str]] = defaultdict(list)
    for call in trace.modules:
        for value in call.outputs:
            found[value].append(call.path or "")
    return {value: tuple(paths) for value, paths in found.items()}
