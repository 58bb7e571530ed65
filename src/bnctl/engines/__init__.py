"""Two engines that lift a native model to the normalised graph and apply a plan to it; one face."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bnctl.graph.graph import Graph, Node
from bnctl.plan.fold import FoldPlan
from bnctl.plan.insert import InsertSite
from bnctl.plan.merge import Merge

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.numerics.moments import Moments


@dataclass(frozen=True, eq=False)
class Captured:
    """A model that has been lifted.

    Args:
        model: as it came; nobody changes it.
        graph: the normalised graph.
        native: what the engine needs to find its own objects again.
        notes: what a reader should know of the capture.
    """

    model: Model
    graph: Graph
    native: Any
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """What a command asks of an engine. Every method leaves the model that it is given alone."""

    last_axis: bool
    """Whether a norm can be put on the last axis of three or more."""

    def capture(self, model: Model, batch: Batch) -> Captured:
        """Lift a model; the torch engine runs it once on the batch."""
        ...

    def fold(self, captured: Captured, plan: FoldPlan) -> Model:
        """The model with the plan carried out."""
        ...

    def takes_ones(self, captured: Captured, node: Node) -> bool:
        """Whether a convolution can be given a further input channel of ones."""
        ...

    def plan_merges(self, captured: Captured, selected: Callable[[str], bool]) -> tuple[Merge, ...]:
        """The parallel branches that can become one operator."""
        ...

    def merge(self, captured: Captured, merges: tuple[Merge, ...], *, keep: bool = False) -> Model:
        """The model with the merges carried out; layers that are merged into others go, unless they are to be kept."""
        ...

    def shows(self, captured: Captured, values: Collection[int]) -> set[str]:
        """The names under which :meth:`bnctl.runtime.Runner.observe` would show values that a merge changes, in the model after it."""
        ...

    def shown_as(self, captured: Captured, node: Node) -> str:
        """The name under which :meth:`bnctl.runtime.Runner.observe` shows the output of a node."""
        ...

    def calibrate(
        self, captured: Captured, sites: Sequence[InsertSite], batches: Iterable[Batch]
    ) -> Mapping[str, Moments]:
        """Moments of the values behind each site, by site name, in one pass over the data."""
        ...

    def insert(
        self, captured: Captured, sites: Sequence[InsertSite], moments: Mapping[str, Moments], eps: float
    ) -> Model:
        """The model with a norm behind each site that computes the identity."""
        ...


def engine_of(model: Model) -> Engine:
    """The engine for a model. The ONNX engine never imports torch."""
    if model.kind == "onnx":
        from bnctl.engines.onnx.engine import OnnxEngine

        return OnnxEngine()
    from bnctl.engines.torch.engine import TorchEngine

    return TorchEngine()
