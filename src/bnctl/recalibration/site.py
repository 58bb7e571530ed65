"""A site: running statistics that a model keeps, as far as every worker must know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnctl.recalibration.estimate import Statistics


@dataclass(frozen=True, eq=False)
class Site:
    """Statistics of one normalisation.

    Args:
        name: of the layer; no other site has it.
        mean_path: where the model keeps the running mean.
        var_path: where it keeps the running variance.
        eps: added to the variance.
        resolution: machine epsilon of the layer's activations.
        before: the statistics as they were.
        between: whether the spread of the calls' means is part of the variance; not for instance normalisation.
        momentum: weight of a new batch in training; None for the plain average of all batches.
        calls_before: how many batches training has seen.
    """

    name: str
    mean_path: str
    var_path: str
    eps: float
    resolution: float
    before: Statistics
    between: bool = True
    momentum: float | None = 0.1
    calls_before: int = 0
