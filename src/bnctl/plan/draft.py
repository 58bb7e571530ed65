"""The draft of a fold plan: the graph with what is already planned away taken out, and the search for a way for one more layer.

A layer (all its calls together) is folded in one step or not at all: one that is called twice goes only when every call can go and all of them leave the
same parameters behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bnctl.codes import Obstacle
from bnctl.graph.affine import AffineMap
from bnctl.graph.graph import Graph, Node, Slot
from bnctl.graph.ops import Affine, Embedding, Identity, LinearOp, Op, Permute, Rearrange, Reshape, Select
from bnctl.plan.backward import backward, undisturbed
from bnctl.plan.forward import forward, forward_padded
from bnctl.plan.moves import Absorb, Choice, Move, Pass

VIEWS = (Identity, Permute, Rearrange, Reshape, Select)
"""Operators whose output may be the same memory as their input."""

Absorbed = dict[int, list[Absorb]]
"""What each absorbing node takes, in order."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A linear operator, or a normalisation layer that stays, takes affines into its parameters."""

    node: Node
    absorbs: tuple[Absorb, ...]

    @property
    def scales(self) -> bool:
        """Whether the weight changes: a shift goes into the bias, or into the rows of a table."""
        table = isinstance(self.node.op, Embedding)
        return any(np.any(absorb.scale != 1) or (table and np.any(absorb.shift != 0)) for absorb in self.absorbs)

    @property
    def shifts(self) -> bool:
        """Whether the bias changes."""
        return any(
            absorb.side != "padded"
            and (np.any(absorb.shift != 0) or (absorb.side == "output" and np.any(absorb.scale != 1)))
            for absorb in self.absorbs
        )

    @property
    def takes_ones(self) -> bool:
        """Whether the operator gets a further input channel of ones."""
        return any(absorb.side == "padded" for absorb in self.absorbs)

    @property
    def weight(self) -> Slot:
        """Where the weight is stored."""
        assert self.node.weight is not None
        return self.node.weight


@dataclass
class Draft:
    """The graph with the affines that are already planned away taken out."""

    graph: Graph
    untie: bool = True
    takes_ones: Callable[[Node], bool] = lambda node: False
    alias: dict[int, int] = field(default_factory=dict)
    observed: dict[int, Obstacle] = field(init=False)
    readers: dict[int, list[Node]] = field(init=False)
    absorbed: Absorbed = field(default_factory=dict)
    meaning: dict[int, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.observed = {v.id: v.observed for v in self.graph.values.values() if v.observed is not None}
        self.readers = {value: list(nodes) for value, nodes in self.graph.readers.items()}

    def resolve(self, value: int) -> int:
        """The value that stands for this one now."""
        while value in self.alias:
            value = self.alias[value]
        return value

    def fold(self, nodes: list[Node]) -> tuple[str, ...] | Obstacle:
        """Fold all calls of a layer, or none: names of the layers that absorb it, or the reason."""
        for node in nodes:
            if obstacle := node.obstacle or getattr(node.op, "obstacle", None):
                return obstacle
            if not self._map(node).finite:
                return Obstacle("BN115", "scale or shift is not finite")
        crossed: set[int] = set()
        if all(self._map(node).identity for node in nodes):
            free = all(self._is_fresh(self.resolve(node.inputs[0])) for node in nodes)
            needless = {} if free else self._try(nodes, self._ahead, crossed)
            return needless if isinstance(needless, Obstacle) else self._commit(nodes, {}, {})
        back = self._try(nodes, self._back, crossed)
        if not isinstance(back, Obstacle):  # what went into the layer now is what came out of it
            became = {
                self.resolve(node.inputs[0]): self.meaning.get(node.outputs[0], node.outputs[0]) for node in nodes
            }
            return self._commit(nodes, back, dict.fromkeys(crossed) | became)
        crossed.clear()
        ahead = self._try(nodes, self._ahead, crossed)
        if not isinstance(ahead, Obstacle):
            return self._commit(nodes, ahead, dict.fromkeys(crossed))
        return Obstacle(back.code, f"{back.detail}; forward: {ahead.detail} ({ahead.code})")

    def _is_fresh(self, value: int) -> bool:
        """Whether a value is in memory of its own, which only one node reads: that node's readers may do with it what they like."""
        producer = self.graph.producer.get(value)
        made = producer is not None and not isinstance(producer.op, VIEWS) and not producer.in_place
        return made and len(self.readers[value]) == 1 and value not in self.observed

    def _map(self, node: Node) -> AffineMap:
        """The affine of a node, with what it has absorbed since."""
        assert isinstance(node.op, Affine)
        m = node.op.map
        for taken in self.absorbed.get(node.id, ()):
            m = m.then(AffineMap.along(node.op.axis, m.rank, taken.scale, taken.shift))
        return m

    def _now(self, node: Node) -> Op:
        """The operator with what it has absorbed: a normalisation layer that stays has become another affine."""
        return replace(node.op, map=self._map(node)) if isinstance(node.op, Affine) else node.op

    def _try(
        self,
        nodes: list[Node],
        move: Callable[[Node, set[int]], list[tuple[Node, Absorb]] | Obstacle],
        crossed: set[int],
    ) -> Absorbed | Obstacle:
        """What each operator would absorb; the values that would change are added to ``crossed``."""
        taken: Absorbed = {}
        for node in nodes:
            moved = move(node, crossed)
            if isinstance(moved, Obstacle):
                return moved
            for absorber, absorb in moved:
                taken.setdefault(absorber.id, []).append(absorb)
        return self._conflict(taken) or taken

    def _back(self, site: Node, crossed: set[int]) -> list[tuple[Node, Absorb]] | Obstacle:
        found = self._back_from([(site.inputs[0], self._map(site), site)])
        if isinstance(found, Obstacle):
            return found
        taken, values = found
        crossed |= values
        return taken

    def _back_from(
        self, todo: list[tuple[int, AffineMap, Node]]
    ) -> tuple[list[tuple[Node, Absorb]], set[int]] | Obstacle:
        """Move maps back from the values on which they act, each towards the reader that comes with it: what absorbs them, and the values that change."""
        taken, crossed = [], set()
        while todo:
            value, m, reader = todo.pop()
            value = self.resolve(value)
            crossed.add(value)
            name = self.graph.values[value].name
            if value in self.observed:
                return self.observed[value]
            others = list(self.readers[value])
            others.remove(reader)
            if not all(undisturbed(other, reader, m) for other in others):
                layers = sorted({n.layer for n in others if n is not reader})
                more = f" and {len(layers) - 2} more" if len(layers) > 2 else ""
                named = ", ".join(layers[:2]) or "the same layer a second time"
                return Obstacle("BN101", f"{name} is also read by {named}{more}")
            producer = self.graph.producer.get(value)
            if producer is None:
                known = value in self.graph.inputs
                source = "is an input of the model" if known else "comes from code that is no operator"
                return Obstacle("BN104", f"{name} {source}")
            moved = backward(self._now(producer), producer, self.graph, value, m)
            if isinstance(moved, Obstacle):
                return moved
            if isinstance(moved, Absorb):
                taken.append((producer, moved))
            elif isinstance(moved, Pass):
                todo += [(v, part, producer) for v, part in _changing(moved)]
            else:
                chosen = self._first_of(moved, producer)
                if isinstance(chosen, Obstacle):
                    return chosen
                taken += chosen[0]
                crossed |= chosen[1]
        return taken, crossed

    def _first_of(self, choice: Choice, via: Node) -> tuple[list[tuple[Node, Absorb]], set[int]] | Obstacle:
        """The first way that can be gone to its end; the obstacle of the first, where there is none."""
        tried = (self._back_from([(v, m, via) for v, m in _changing(o)]) for o in choice.options)
        obstacles = []
        for found in tried:
            if not isinstance(found, Obstacle):
                return found
            obstacles.append(found)
        return obstacles[0]

    def _ahead(self, site: Node, crossed: set[int]) -> list[tuple[Node, Absorb]] | Obstacle:
        taken = []
        writer = self._writer_of(self.resolve(site.inputs[0]), site)
        if writer is not None:  # what reads the layer would see it
            return Obstacle("BN117", f"{writer.layer} writes into what it reads in place")
        todo = [(site.outputs[0], self._map(site))]
        while todo:
            value, m = todo.pop()
            crossed.add(value)
            if value in self.observed:
                return self.observed[value]
            readers = self.readers[value]
            if not readers:
                continue
            for reader in readers:
                places = [i for i, v in enumerate(reader.inputs) if self.resolve(v) == value]
                if len(places) != 1:
                    return Obstacle("BN101", f"{reader.layer} reads it twice")
                if reader.in_place:  # without the layer it would write into what the layer reads
                    return Obstacle("BN117", f"{reader.layer} writes into it in place")
                moved = self._forward(reader, places[0], m)
                if isinstance(moved, Pass):
                    todo += moved.maps
                elif m.identity and not (isinstance(moved, Obstacle) and moved.code == "BN117"):
                    continue  # a part of the value on which nothing changes
                elif isinstance(moved, Obstacle):
                    return moved
                elif isinstance(moved, Absorb):
                    taken.append((reader, moved))
        return taken

    def _forward(self, reader: Node, index: int, m: AffineMap) -> Move:
        moved = forward(self._now(reader), reader, self.graph, index, m)
        has_ones = any(a.side == "padded" for a in self.absorbed.get(reader.id, ()))
        if has_ones or (isinstance(moved, Obstacle) and moved.code == "BN114" and self.takes_ones(reader)):
            return forward_padded(reader.op, reader, m) or moved
        return moved

    def _writer_of(self, value: int, site: Node) -> Node | None:
        """Somebody else who writes in place into the memory of a value, through whatever view of it."""
        while (producer := self.graph.producer.get(value)) is not None and isinstance(producer.op, VIEWS):
            value = self.resolve(producer.inputs[0])
        todo, seen = [value], set[int]()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            for reader in (r for r in self.readers[value] if r is not site):
                obstacle = getattr(reader.op, "obstacle", None)
                if reader.in_place or (obstacle is not None and obstacle.code == "BN117"):
                    return reader
                if isinstance(reader.op, VIEWS):
                    todo += reader.outputs
        return None

    def _conflict(self, taken: Absorbed) -> Obstacle | None:
        """Every call that reads a parameter must agree on what becomes of it."""
        for node_id, absorbs in taken.items():
            node = self.graph.by_id[node_id]
            slots = [slot for slot in (node.weight, node.bias) if slot is not None]
            tied = next((slot for slot in slots if self._tied(slot)), None)
            if tied is not None and not self.untie:
                return Obstacle("BN122", f"{tied.key} is tied to another parameter")
            for key in (slot.key for slot in slots):
                if any(not _equal(absorbs, taken.get(other.id, [])) for other in self.graph.slot_readers[key]):
                    return Obstacle("BN106", f"{key} is read by several calls, and they would need different weights")
        return None

    def _commit(self, nodes: list[Node], taken: Absorbed, meaning: dict[int, int | None]) -> tuple[str, ...]:
        self.meaning |= meaning
        for node_id, absorbs in taken.items():
            self.absorbed.setdefault(node_id, []).extend(absorbs)
        for node in nodes:
            source, result = self.resolve(node.inputs[0]), node.outputs[0]
            self.readers[source].remove(node)
            self.readers[source].extend(self.readers[result])
            self.alias[result] = source
            if result in self.observed:
                self.observed[source] = self.observed[result]
        return tuple(dict.fromkeys(self.graph.by_id[i].layer for i in taken))

    def edits(self) -> Iterator[Edit]:
        """One edit per stored weight: calls of the same layer agree."""
        removed = {n.id for v in self.alias if (n := self.graph.producer.get(v)) is not None}
        seen: set[str] = set()
        for node_id in sorted(self.absorbed):
            node = self.graph.by_id[node_id]
            assert node.weight is not None
            if node_id not in removed and node.weight.key not in seen:
                seen.add(node.weight.key)
                yield Edit(node, tuple(self.absorbed[node_id]))

    def ties(self) -> tuple[list[Slot], dict[str, str]]:
        """What becomes of arrays that several slots hold: the slots that need one of their own before they are written, and by key those that share the new one
        of another slot, because both ask for the same. Where nobody keeps the old array, the first slot may have it.
        """
        written: dict[str, list[tuple[Edit, Slot]]] = {}
        for edit in self.edits():
            for slot, changes in ((edit.node.weight, edit.scales or edit.takes_ones), (edit.node.bias, edit.shifts)):
                if slot is not None and changes and slot.tensor and self._tied(slot):
                    written.setdefault(slot.tied_by, []).append((edit, slot))
        own: list[Slot] = []
        shared: dict[str, str] = {}
        for tensor, holders in written.items():
            first: list[tuple[Edit, Slot]] = []
            for edit, slot in holders:
                same = next((other for e, other in first if _alike(e, edit, slot)), None)
                if same is None:
                    first.append((edit, slot))
                else:
                    shared[slot.key] = same.key
            places = max(holders[0][1].places, len(self.graph.tensor_slots.get(tensor, ())))
            own += [slot for _, slot in first[len(holders) >= places :]]
        return own, shared

    def _tied(self, slot: Slot) -> bool:
        return slot.places > 1 or len(self.graph.tensor_slots.get(slot.tied_by, ())) > 1


def _changing(moved: Pass) -> list[tuple[int, AffineMap]]:
    """The branches on which an affine changes anything. A single input is followed in any case: it may be the same memory as the output."""
    return [(value, m) for value, m in moved.maps if len(moved.maps) == 1 or not m.identity]


def _alike(one: Edit, two: Edit, slot: Slot) -> bool:
    """Whether two edits leave the same behind in a slot of the second: they take the same into the same. A new weight does not depend on the bias."""
    nodes = one.node, two.node
    layouts = [
        (type(op), op.layout, op.weight_factor, op.bias_factor)
        for op in (n.op for n in nodes)
        if isinstance(op, LinearOp)
    ]
    biases = {n.bias.tensor if n.bias is not None else None for n in nodes}
    same = one.weight.tensor == two.weight.tensor and (slot is two.node.weight or len(biases) == 1)
    return (
        same
        and len(layouts) == 2
        and layouts[0] == layouts[1]
        and not one.takes_ones
        and _equal(one.absorbs, two.absorbs)
    )


def _equal(one: Sequence[Absorb], two: Sequence[Absorb]) -> bool:
    return len(one) == len(two) and all(
        a.side == b.side and np.array_equal(a.scale, b.scale) and np.array_equal(a.shift, b.shift)
        for a, b in zip(one, two, strict=True)
    )
