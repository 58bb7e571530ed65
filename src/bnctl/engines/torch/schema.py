"""What an operator's schema says of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bnctl.engines.torch.nested import tensors_in


@dataclass(frozen=True)
class Operator:
    """What matters of a schema, read once: schemas are slow to read, and every call asks.

    Args:
        name: with its overload.
        writes: positions and names of the arguments that are written.
        random: draws random numbers.
    """

    name: str
    writes: tuple[tuple[int, str], ...]
    random: bool

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that a call writes."""
        return [t for at, name in self.writes for t in tensors_in(args[at] if at < len(args) else kwargs.get(name))]


@cache
def operator_of(func: Any) -> Operator:
    """The operator as its overload's schema describes it."""
    writes = (
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return Operator(str(func), tuple(writes), torch.Tag.nondeterministic_seeded in func.tags)
