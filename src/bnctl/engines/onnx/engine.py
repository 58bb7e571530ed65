"""The ONNX engine: lift, surgery on a structural copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bnctl.engines import Captured
from bnctl.engines.onnx.apply import apply_fold
from bnctl.engines.onnx.calibrate import calibrate
from bnctl.engines.onnx.insert import apply_insert
from bnctl.engines.onnx.lift import Lifted, lift
from bnctl.engines.onnx.merge import apply_merges
from bnctl.graph.graph import Node
from bnctl.plan.fold import FoldPlan
from bnctl.plan.insert import InsertSite
from bnctl.plan.merge import Merge, plan_merge

if TYPE_CHECKING:
    import onnx_ir as ir

    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.numerics.moments import Moments


class OnnxEngine:
    """See :class:`bnctl.engines.Engine`."""

    last_axis = False

    def capture(self, model: Model, batch: Batch | None = None) -> Captured:
        """Lift the model; the batch is not needed.

        Raises:
            ModelError: the opset is older than 7.
        """
        lifted = lift(_native(model))
        return Captured(model, lifted.graph, lifted)

    def fold(self, captured: Captured, plan: FoldPlan) -> Model:
        """The folded model, sharing untouched weights with the one that was captured."""
        return replace(captured.model, native=apply_fold(captured.native, plan))

    def takes_ones(self, captured: Captured, node: Node) -> bool:
        """Any."""
        return True

    def plan_merges(self, captured: Captured, selected: Callable[[str], bool]) -> tuple[Merge, ...]:
        """Any."""
        return plan_merge(captured.graph, selected=selected)

    def merge(self, captured: Captured, merges: tuple[Merge, ...], *, keep: bool = False) -> Model:
        """The merged model, sharing untouched weights with the one that was captured. Nobody looks at nodes that are gone."""
        return replace(captured.model, native=apply_merges(captured.native, merges))

    def shows(self, captured: Captured, values: Collection[int]) -> set[str]:
        """None: what changes gets another name."""
        return set()

    def shown_as(self, captured: Captured, node: Node) -> str:
        """The value's name."""
        return captured.graph.values[node.outputs[0]].name

    def calibrate(
        self, captured: Captured, sites: Sequence[InsertSite], batches: Iterable[Batch]
    ) -> Mapping[str, Moments]:
        """Moments of the values behind each site, run by ONNX Runtime with its optimisations off."""
        from bnctl.runtime.ort import OrtRunner

        lifted: Lifted = captured.native
        names = {site.name: lifted.graph.values[site.values[0]].name for site in sites}
        word = captured.model.word
        moments = calibrate(lifted.model, tuple(names.values()), batches, lambda model: OrtRunner(model, name=word).run)
        return {site: moments[name] for site, name in names.items()}

    def insert(
        self, captured: Captured, sites: Sequence[InsertSite], moments: Mapping[str, Moments], eps: float
    ) -> Model:
        """The model with a BatchNormalization behind each site."""
        return replace(captured.model, native=apply_insert(captured.native, sites, moments, eps))


def _native(model: Model) -> ir.Model:
    native: ir.Model = model.native  # type: ignore[assignment]
    return native
