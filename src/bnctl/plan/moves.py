"""What a rule may answer: how an affine moves past one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bnctl.codes import Obstacle
from bnctl.graph.affine import AffineMap, Array

Side = Literal["output", "input", "padded"]


@dataclass(frozen=True, eq=False)
class Absorb:
    """The operator takes scale and shift into its parameters: vectors over its output or input channels.

    "padded" are the input channels of a convolution with zeros around its input, which gets a channel of ones beside them.
    """

    side: Side
    scale: Array
    shift: Array


@dataclass(frozen=True, eq=False)
class Pass:
    """The affine moves on: one map per value on the other side of the operator."""

    maps: tuple[tuple[int, AffineMap], ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """The affine moves on in one of several ways, all of them exact: any branch of a sum may take the shift."""

    options: tuple[Pass, ...]


Move = Absorb | Pass | Choice | Obstacle
