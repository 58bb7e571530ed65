"""The table from torch operators to the vocabulary of the normalised graph: one small entry per operator.

An operator that is not in the table, or whose arguments do not fit, is opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bnctl.engines.torch.record import OpCall
from bnctl.graph import ops
from bnctl.graph.graph import Slot

Array = NDArray[np.float64]


class Operands(Protocol):
    """What an entry may ask about the arguments of a call."""

    def constant(self, item: Any) -> Array | None:
        """The value of an argument that does not depend on the model's input."""

    def is_data(self, item: Any) -> bool:
        """Whether an argument is a tensor that may depend on the model's input."""

    def shape(self, item: Any) -> tuple[int, ...]:
        """Sizes of a tensor argument."""

    def weight(self, item: Any, call: OpCall) -> Slot | None:
        """The slot of a weight; None where it depends on the model's input."""

    def bias(self, item: Any, weight: Slot | None, call: OpCall, behind: int = 0) -> Slot | None:
        """The slot of a bias, empty where one can be added; None where there is no room for one. ``behind`` axes come after the channels."""


@dataclass(frozen=True)
class Translated:
    """An operator in normalised terms, with the slots of its parameters.

    ``reads`` are the positions of the arguments whose *elements* are read, where some tensors lend only their shape (``view_as``); None for all.
    """

    op: ops.Op
    weight: Slot | None = None
    bias: Slot | None = None
    reads: tuple[int, ...] | None = None


Entry = Callable[[OpCall, Operands], Translated | None]
TABLE: dict[str, Entry] = {}
"""Entries by operator, without the underscore of in-place forms; the files of this package fill it."""


def translate(call: OpCall, operands: Operands) -> Translated | None:
    """Look the operator up; None where it is opaque."""
    entry = TABLE.get(_base(call.op))
    return entry(call, operands) if entry else None


def _base(op: str) -> str:
    """``aten.relu_.default`` and ``aten.relu.default`` mean the same to the graph."""
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return f"{namespace}.{name}.{overload}"


def entry_for(*names: str) -> Callable[[Entry], Entry]:
    """Put an entry into the table, under the names of its operators."""

    def register(entry: Entry) -> Entry:
        TABLE.update({f"aten.{name}": entry for name in names})
        return entry

    return register


def argument(call: OpCall, position: int, default: Any = None, name: str = "") -> Any:
    """An argument by position, or by name where it was given so."""
    return call.args[position] if position < len(call.args) else call.kwargs.get(name, default)


def any_nonzero(padding: Any) -> bool:
    """Whether an operator's padding argument pads at all."""
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
