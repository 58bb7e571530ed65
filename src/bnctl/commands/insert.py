"""`bnctl insert`: capture, plan, calibrate, apply, verify, write."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bnctl.codes import Obstacle
from bnctl.commands.fold import Outcome
from bnctl.commands.setup import Progress, Setup, no_progress
from bnctl.data.batches import first_of
from bnctl.models.save import Target
from bnctl.plan.insert import InsertSite, plan_insert
from bnctl.report import Artifact, Report, Site
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.numerics.moments import Moments

DEFAULT_EPS = 1e-5


def insert_model(
    model: Model,
    batches: Iterable[Batch],
    *,
    example: Batch | None = None,
    selection: Selection | None = None,
    eps: float = DEFAULT_EPS,
    tolerance: float | None = None,
    dry_run: bool = False,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Outcome:
    """Put a BatchNorm that computes the identity behind every linear layer that feeds an activation.

    Args:
        model: left alone.
        batches: the statistics are theirs.
        example: on which the model is looked at; by default their first.
        selection: of layers; all by default.
        eps: of the new layers.
        tolerance: of the check; by default it follows from the dtype.
        dry_run: only the plan.
        device: where the check runs.
        progress: is told how far it is.

    Raises:
        DataError: there are no data, or they are not finite.
        EquivalenceError: the model does not compute the same afterwards.
    """
    from bnctl.commands.equivalence import check_equivalence, require
    from bnctl.engines import engine_of

    started = time.perf_counter()
    selection = selection or Selection()
    engine = engine_of(model)
    example = first_of(batches) if example is None else example
    captured = engine.capture(model, example)
    plan = plan_insert(captured.graph, selection=selection, last_axis=engine.last_axis)
    selection.check(site.name for site in plan)
    chosen = [site for site in plan if site.obstacle is None]
    if dry_run or not chosen:
        return Outcome(model, replace(_report(model, plan, {}, eps), elapsed_s=time.perf_counter() - started))
    samples = 0

    def counted() -> Iterator[Batch]:
        nonlocal samples
        for number, batch in enumerate(batches, start=1):
            yield batch
            samples += batch.size
            progress("calibrate", number, None)

    moments = engine.calibrate(captured, chosen, counted())
    plan = tuple(_with_enough_values(site, moments) for site in plan)
    chosen = [site for site in plan if site.obstacle is None]
    inserted = engine.insert(captured, chosen, moments, eps)
    verification = check_equivalence(model, inserted, example, tolerance=tolerance, device=device)
    require(verification, "insert", model.word)
    report = _report(model, plan, moments, eps)
    report = replace(report, verification=verification.to_dict(), summary={**report.summary, "samples": samples})
    return Outcome(inserted, replace(report, elapsed_s=time.perf_counter() - started))


def run_insert(
    word: str,
    target: Target,
    setup: Setup,
    *,
    selection: Selection,
    eps: float,
    tolerance: float | None,
) -> Report:
    """The command: insert norms and write the model."""
    started = time.perf_counter()
    model = setup.open(word)
    target.check(model.kind)
    batches = [setup.example(model)] if target.dry_run and setup.data is None else setup.batches()
    outcome = insert_model(
        model,
        batches,
        example=setup.example(model) if setup.inputs else None,
        selection=selection,
        eps=eps,
        tolerance=tolerance,
        dry_run=target.dry_run,
        device=setup.device,
        progress=setup.progress,
    )
    report = outcome.report
    return replace(
        report, output=target.save(outcome.model, first_of(batches)), elapsed_s=time.perf_counter() - started
    )


def _with_enough_values(site: InsertSite, moments: Mapping[str, Moments]) -> InsertSite:
    if site.obstacle is None and site.name not in moments:
        return replace(site, obstacle=Obstacle("BN121", "the calibration data never reached it"))
    if site.obstacle is None and moments[site.name].count < 2:
        return replace(site, obstacle=Obstacle("BN207", "the calibration data hold one value per channel"))
    return site


def _report(model: Model, plan: Iterable[InsertSite], moments: Mapping[str, Moments], eps: float) -> Report:
    sites = []
    still = {}
    for site in plan:
        if site.obstacle is not None:
            sites.append(Site(site.name, "left", (), site.obstacle.code, site.obstacle.detail))
            continue
        quiet = int(np.sum(moments[site.name].variance() < eps)) if site.name in moments else 0
        if quiet:
            still[site.name] = quiet
        details = {"features": site.features, "quiet_channels": quiet} if moments else {"features": site.features}
        sites.append(Site(site.name, "inserted", details=details))
    inserted = sum(s.action == "inserted" for s in sites)
    notes = []
    if not inserted:
        notes.append("no layer takes a normalisation: see the codes of the layers")
    if still:
        worst = max(still, key=lambda name: still[name])
        notes.append(
            f"{sum(still.values())} channels in {len(still)} layers vary by less than eps (most in {worst}: {still[worst]}): "
            "in training they react violently (BN208)"
        )
    if inserted:
        notes.append(
            "the function is preserved in eval mode; in training mode a BatchNorm uses batch statistics, so the function changes there"
        )
    summary = {"found": len(sites), "inserted": inserted, "left": len(sites) - inserted}
    return Report("insert", Artifact(model.word, model.sha256), sites=tuple(sites), summary=summary, notes=tuple(notes))
