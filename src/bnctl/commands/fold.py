"""`bnctl fold`: capture, plan, apply, verify, write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bnctl.commands.bisect import bisect
from bnctl.commands.rounds import FoldOptions, Rounds, run_rounds
from bnctl.commands.setup import Setup
from bnctl.models.save import Target
from bnctl.report import Artifact, Report
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.runtime import Runner
    from bnctl.verification import Verification


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
    options: FoldOptions | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    dry_run: bool = False,
    device: str = "cpu",
) -> Outcome:
    """Fold every affine that can be folded exactly.

    Raises:
        ModelError: the model cannot be captured, or a copy of it is another model.
        EquivalenceError: the folded model does not compute the same.
        OverflowInFoldError: folded weights do not fit their dtype.
    """
    from bnctl.commands.equivalence import baseline_ahead, check_copy, require

    started = time.perf_counter()
    selection, options = selection or Selection(), options or FoldOptions()
    verify = verify and not dry_run
    with baseline_ahead(model, example, device) if verify else nullcontext() as baseline:
        rounds = run_rounds(model, example, takes=selection.takes, options=options, plan_only=dry_run)
        selection.check(rounds.sites)
        report = _report(model, rounds)
        if dry_run or not rounds.changed:
            return Outcome(model, replace(report, elapsed_s=time.perf_counter() - started))
        if verify:
            verification = _compared(model, rounds, example, tolerance, device, baseline)
            if not verification.passed:
                found = not verification.inconclusive
                if found:
                    check_copy(model, example, device)
                culprits = _culprits(model, rounds, example, options, tolerance, device) if found else ()
                require(verification, "fold", model.word, culprits)
            report = replace(report, verification=verification.to_dict())
    return Outcome(rounds.model, replace(report, elapsed_s=time.perf_counter() - started))


def _compared(
    model: Model,
    rounds: Rounds,
    example: Batch,
    tolerance: float | None,
    device: str,
    baseline: Runner | None = None,
) -> Verification:
    from bnctl.commands.equivalence import check_equivalence

    return check_equivalence(
        model,
        rounds.model,
        example,
        layers=rounds.preserved,
        altered=rounds.altered,
        tolerance=tolerance,
        device=device,
        baseline=baseline,
    )


def _culprits(
    model: Model, rounds: Rounds, example: Batch, options: FoldOptions, tolerance: float | None, device: str
) -> tuple[str, ...]:
    """The layers that cannot be folded without changing the function, found by folding fewer and fewer."""

    def fails(names: Sequence[str]) -> bool:
        part = run_rounds(model, example, takes=set(names).__contains__, options=options)
        return part.changed and not _compared(model, part, example, tolerance, device).passed

    done = [site.name for site in rounds.sites.values() if site.action != "left"]
    return bisect(done, fails)


def run_fold(
    word: str,
    target: Target,
    setup: Setup,
    *,
    selection: Selection,
    tolerance: float | None,
    verify: bool,
    options: FoldOptions | None = None,
) -> Report:
    """The command: fold a model and write it."""
    started = time.perf_counter()
    model = setup.open(word)
    target.check(model.kind)
    example = setup.example(model, run=verify and not target.dry_run)
    outcome = fold_model(
        model,
        example,
        selection=selection,
        options=options,
        tolerance=tolerance,
        verify=verify,
        dry_run=target.dry_run,
        device=setup.device,
    )
    report = outcome.report
    return replace(report, output=target.save(outcome.model, example), elapsed_s=time.perf_counter() - started)


def _report(model: Model, rounds: Rounds) -> Report:
    sites = tuple(rounds.sites.values())
    affines = [s for s in sites if s.action != "merged"]
    folded = sum(s.action == "folded" for s in affines)
    summary = {"found": len(affines), "folded": folded, "left": len(affines) - folded}
    if len(affines) < len(sites):
        summary["merged"] = len(sites) - len(affines)
    if rounds.added_parameters:
        summary["added_parameters"] = rounds.added_parameters
    notes = [] if sites else ["the model has no normalisation layer and no channel affine: nothing to fold"]
    return Report(
        "fold", Artifact(model.word, model.sha256), sites=sites, summary=summary, notes=(*notes, *rounds.notes)
    )
