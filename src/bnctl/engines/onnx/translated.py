"""What a rule of the translation table is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.engines.onnx.constants import Constants
from bnctl.engines.onnx.shapes import TensorInfo
from bnctl.graph.affine import Shape
from bnctl.graph.ops import Op

_SMALL = 2**20
"""Constants with more elements than this are weights, not factors or shapes."""


@dataclass(frozen=True, eq=False)
class Place:
    """An input of a node where a parameter is read. ``index`` is None where the node has no such input, and an Add behind it would hold the parameter.

    A bias that is added has ``behind`` axes of size one behind that of its channels.
    """

    node: ir.Node
    index: int | None
    behind: int = 0

    @property
    def value(self) -> ir.Value | None:
        """What is read there; None where the place is empty."""
        return input_of(self.node, self.index) if self.index is not None else None

    @property
    def key(self) -> str:
        """A name for the place, unique in the model."""
        return f"{self.node.outputs[0].name}:{'+' if self.index is None else self.index}"


@dataclass(frozen=True, eq=False)
class Translated:
    """An operator of the normalised graph.

    Args:
        op: the operator.
        weight, bias: where it reads its parameters.
        outputs: the values it makes, where these are more than the first output. Outputs that are left out must have no reader.
        last: the last native node, where the operator spans two.
        reads: the values it reads as data, where these are not simply all that are not constant.
    """

    op: Op
    weight: Place | None = None
    bias: Place | None = None
    outputs: tuple[ir.Value, ...] = ()
    last: ir.Node | None = None
    reads: tuple[ir.Value, ...] | None = None


@dataclass(frozen=True, eq=False)
class Scope:
    """A model, as the rules see it."""

    opset: int
    info: Mapping[str, TensorInfo]
    constants: Constants
    unknown: TensorInfo = field(default_factory=TensorInfo)

    def of(self, value: ir.Value | None) -> TensorInfo:
        """What is known of a value."""
        return self.unknown if value is None else self.info.get(str(value.name), self.unknown)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Sizes of a value, where its rank is known."""
        return self.of(value).shape

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes of a value, where known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def constant(self, node: ir.Node, index: int) -> NDArray[Any] | None:
        """A small constant input; None where there is none."""
        return self.constants.array(input_of(node, index), _SMALL)

    def integers(self, node: ir.Node, index: int, name: str) -> tuple[int, ...] | None:
        """A list of integers that is an attribute in early opsets and a constant input in later ones; None where it is neither."""
        if name in node.attributes:
            return tuple(node.attributes.get_ints(name))
        array = self.constant(node, index)
        return None if array is None else tuple(int(n) for n in array.reshape(-1))


Rule = Callable[[ir.Node, Scope], Translated | None]
"""Translates one native node; None where it is one of the forms that nothing is known about."""


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def flag(node: ir.Node, name: str, *, default: bool = False) -> bool:
    """An attribute that is 0 or 1."""
    return bool(node.attributes.get_int(name, int(default)))


def axis_attribute(node: ir.Node, default: int) -> int:
    """The attribute ``axis``."""
    return int(node.attributes.get_int("axis", default))
