"""`bnctl recalibrate`: new running statistics from data."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal

from bnctl.commands.fold import Outcome
from bnctl.commands.setup import Progress, Setup, no_progress
from bnctl.data.batches import first_of
from bnctl.errors import UsageError
from bnctl.models.save import Target
from bnctl.report import Artifact, Report, Site
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.models.model import Model
    from bnctl.recalibration.statistics import SiteStatistics

Method = Literal["exact", "batch"]


def recalibrate_model(
    model: Model,
    batches: Iterable[Batch],
    *,
    method: Method = "exact",
    selection: Selection | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Outcome:
    """Give every BatchNorm the statistics that inference on these data will see.

    Raises:
        DataError: there are no data, or they are not finite.
        ModelError: the model has no BatchNorm, or fails on the data.
        UsageError: the model is an ONNX file.
    """
    if model.kind == "onnx":
        raise UsageError(
            f"{model.word}: this version recalibrates torch models only",
            hint="recalibrate the torch model, then bnctl export",
        )
    import torch

    from bnctl.engines.torch.engine import copy_module
    from bnctl.engines.torch.recalibrate import recalibrate

    started = time.perf_counter()
    selection = selection or Selection()
    module = copy_module(model.native, model.word) if isinstance(model.native, torch.fx.GraphModule) else model.native
    assert isinstance(module, torch.nn.Module)
    new, sites, samples = recalibrate(
        module,
        batches,
        method=method,
        where=selection.where or None,
        skip=selection.skip or None,
        device=device,
        progress=progress,
    )
    selection.check(site.name for site in sites)
    report = Report(
        "recalibrate",
        Artifact(model.word, model.sha256),
        sites=tuple(_site(site) for site in sites),
        summary={
            "found": len(sites),
            "recalibrated": sum(s.action == "recalibrated" for s in sites),
            "left": sum(s.action == "left" for s in sites),
            "samples": samples,
            "method": method,
        },
        notes=("recalibration changes the function: check accuracy with bnctl bench before you ship it",),
        elapsed_s=time.perf_counter() - started,
    )
    return Outcome(replace(model, native=new, program=None), report)


def run_recalibrate(word: str, target: Target, setup: Setup, *, method: Method, selection: Selection) -> Report:
    """The command: recalibrate a model and write it."""
    started = time.perf_counter()
    model = setup.open(word)
    target.check(model.kind)
    batches = setup.batches()
    outcome = recalibrate_model(
        model, batches, method=method, selection=selection, device=setup.device, progress=setup.progress
    )
    output = target.save(outcome.model, first_of(batches))
    return replace(outcome.report, output=output, elapsed_s=time.perf_counter() - started)


def _site(site: SiteStatistics) -> Site:
    drift = None if site.drift is None else asdict(site.drift)
    details = {
        "drift": drift,
        "self_consistency": site.self_consistency,
        "channels": site.channels,
        "count": site.count,
        "calls": site.calls,
        "dead_channels": site.dead_channels,
    }
    return Site(site.name, site.action, (), site.code, site.reason, details)
