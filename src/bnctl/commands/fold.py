"""`bnctl fold`: capture, plan, apply, verify, write."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bnctl.commands.setup import Setup
from bnctl.models.save import Target
from bnctl.plan.fold import FoldPlan, plan_fold
from bnctl.report import Artifact, Report, Site
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model


@dataclass(frozen=True, eq=False)
class Outcome:
    """A model after surgery, and the report on it; no model where nothing was to be done or only the plan was asked for."""

    model: Model
    report: Report


def fold_model(
    model: Model,
    example: Batch,
    *,
    selection: Selection | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    dry_run: bool = False,
    device: str = "cpu",
) -> Outcome:
    """Fold every affine that can be folded exactly.

    Raises:
        ModelError: the model cannot be captured.
        EquivalenceError: the folded model does not compute the same.
        OverflowInFoldError: folded weights do not fit their dtype.
    """
    from bnctl.commands.equivalence import check_equivalence, require
    from bnctl.engines import engine_of

    started = time.perf_counter()
    selection = selection or Selection()
    engine = engine_of(model)
    captured = engine.capture(model, example)
    plan = plan_fold(captured.graph, selected=selection.takes)
    selection.check(site.name for site in plan.sites)
    report = _report(model, plan)
    report = replace(report, notes=(*report.notes, *captured.notes))
    if dry_run or not plan.removed:
        return Outcome(model, replace(report, elapsed_s=time.perf_counter() - started))
    folded = engine.fold(captured, plan)
    if verify:
        layers = [engine.shown_as(captured, node) for node in plan.preserved]
        verification = check_equivalence(model, folded, example, layers=layers, tolerance=tolerance, device=device)
        require(verification, "fold", model.word)
        report = replace(report, verification=verification.to_dict())
    return Outcome(folded, replace(report, elapsed_s=time.perf_counter() - started))


def run_fold(
    word: str,
    target: Target,
    setup: Setup,
    *,
    selection: Selection,
    tolerance: float | None,
    verify: bool,
) -> Report:
    """The command: fold a model and write it."""
    started = time.perf_counter()
    model = setup.open(word)
    target.check(model.kind)
    example = setup.example(model)
    outcome = fold_model(
        model,
        example,
        selection=selection,
        tolerance=tolerance,
        verify=verify,
        dry_run=target.dry_run,
        device=setup.device,
    )
    report = outcome.report
    return replace(report, output=target.save(outcome.model, example), elapsed_s=time.perf_counter() - started)


def _report(model: Model, plan: FoldPlan) -> Report:
    sites = tuple(Site(s.name, s.action, s.into, s.code, s.reason) for s in plan.sites)
    folded = sum(s.action == "folded" for s in sites)
    summary = {"found": len(sites), "folded": folded, "left": len(sites) - folded}
    if plan.added_parameters:
        summary["added_parameters"] = plan.added_parameters
    notes = [] if sites else ["the model has no normalisation layer and no channel affine: nothing to fold"]
    return Report("fold", Artifact(model.word, model.sha256), sites=sites, summary=summary, notes=tuple(notes))
