"""The normalised graph: values, the nodes that make them, and the places where parameters are stored. Read-only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from bnctl.codes import Obstacle
from bnctl.graph.affine import Shape
from bnctl.graph.ops import Op


@dataclass(frozen=True)
class Value:
    """A tensor that flows through the model.

    Args:
        id: its number.
        name: what a message calls it.
        shape: sizes; a name for a symbolic size, None for an unknown one. None where even the rank is unknown.
        dtype: numpy's name ("float32", "bfloat16").
        observed: set where somebody outside the graph sees the value (it is an output of the model, a hook reads it, it is written in place
            through a view), so that it must not change.
    """

    id: int
    name: str
    shape: Shape | None
    dtype: str
    observed: Obstacle | None = None


@dataclass(frozen=True)
class Slot:
    """A place from which an operator reads a parameter.

    Args:
        key: unique name of the place: ``layer1.0.conv1.weight`` of a module, or node and input number in ONNX. Calls of the same module read the same slot.
        shape: of the stored array; None for a slot that is empty and can be filled (a layer without bias).
        tensor: name of the stored array. Several slots may hold the same one (tied weights).
        obstacle: set where the slot cannot be written.
        places: how many places are known to hold the array, this one and such as no operator reads among them.
        origin: name of the stored array that this one is computed from (transposed, say), where others hold that, too.
    """

    key: str
    shape: tuple[int, ...] | None
    tensor: str = ""
    obstacle: Obstacle | None = None
    places: int = 1
    origin: str = ""

    @property
    def tied_by(self) -> str:
        """The name that all slots have in common that are tied to each other."""
        return self.origin or self.tensor

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for n in self.shape or (0,):
            size *= n
        return size


@dataclass(frozen=True)
class Node:
    """One call of an operator.

    Args:
        id: its number; numbers grow in the order of execution.
        op: what it does to channels.
        layer: the layer that the user knows: a module path, or an ONNX node's name.
        inputs: values it reads as data. Parameters are in the slots.
        outputs: values it makes.
        weight, bias: slots of a linear operator, or of a normalisation layer (gamma, beta).
        obstacle: set where the engine cannot act on the layer: an affine that cannot be taken out, a linear operator behind which nothing can be put.
        in_place: it writes its result into its input, which must then be no tensor that anybody else reads.
    """

    id: int
    op: Op
    layer: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weight: Slot | None = None
    bias: Slot | None = None
    obstacle: Obstacle | None = None
    in_place: bool = False


@dataclass(frozen=True)
class Graph:
    """A model as the planner sees it."""

    nodes: tuple[Node, ...]
    values: dict[int, Value]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str = field(default="model")

    @cached_property
    def by_id(self) -> dict[int, Node]:
        """Nodes by number."""
        return {node.id: node for node in self.nodes}

    @cached_property
    def producer(self) -> dict[int, Node]:
        """The node that makes each value; inputs of the model have none."""
        return {value: node for node in self.nodes for value in node.outputs}

    @cached_property
    def readers(self) -> dict[int, list[Node]]:
        """The nodes that read each value, once per read."""
        found: dict[int, list[Node]] = {value: [] for value in self.values}
        for node in self.nodes:
            for value in node.inputs:
                found[value].append(node)
        return found

    @cached_property
    def slot_readers(self) -> dict[str, list[Node]]:
        """The nodes that read each slot."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for slot in _slots(node):
                found.setdefault(slot.key, []).append(node)
        return found

    @cached_property
    def tensor_slots(self) -> dict[str, set[str]]:
        """The slots that hold each stored array."""
        found: dict[str, set[str]] = {}
        for node in self.nodes:
            for slot in _slots(node):
                if slot.tensor:
                    found.setdefault(slot.tied_by, set()).add(slot.key)
        return found

    def rank(self, value: int) -> int | None:
        """Number of axes of a value, where known."""
        shape = self.values[value].shape
        return None if shape is None else len(shape)


def _slots(node: Node) -> Iterable[Slot]:
    return (slot for slot in (node.weight, node.bias) if slot is not None)
