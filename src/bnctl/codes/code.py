"""What a reason code holds."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import cleandoc


@dataclass(frozen=True)
class Code:
    """A reason that `bnctl explain` documents.

    Args:
        example: torch code that builds ``model`` and ``x``, or a sketch of the ONNX graph; cleaned of the indentation that it has in the source.
    """

    id: str
    title: str
    why: str
    remedy: str
    example: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "example", cleandoc(self.example))


@dataclass(frozen=True)
class Obstacle:
    """A reason at one place: the code, and the detail that names what stands in the way."""

    code: str
    detail: str
