"""`bnctl recalibrate`: new running statistics from data."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.commands import guard
from bnctl.commands.fold import Outcome
from bnctl.commands.recalibration import Place, Recalibration, on_engine
from bnctl.commands.setup import Setup
from bnctl.data.batches import as_batches, first_of
from bnctl.data.finite import finite
from bnctl.data.open import data_files
from bnctl.data.repeat import repeated
from bnctl.errors import DataError, ModelError, UsageError
from bnctl.models.save import Target
from bnctl.recalibration.partial import Partial
from bnctl.recalibration.workers import Alone, Workers
from bnctl.report import Artifact, Report, Site

if TYPE_CHECKING:
    from bnctl.data.batches import Batch, Batches
    from bnctl.models.model import Model
    from bnctl.recalibration.statistics import Recalibrated, SiteStatistics

APART = 0.05
"""Self-consistency beyond which a result is in doubt."""

FAR = 5.0
"""Mean drift of a layer, in nats, that is more than another day's data make."""

FEW = 0.1
"""A mean that is known to so many standard deviations only is worth a word."""

WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Weights of the old statistics that ``--prior auto`` tries."""


def recalibrate_model(
    model: Model,
    batches: Iterable[Batch],
    how: Recalibration | None = None,
    place: Place | None = None,
    *,
    seed: int = 0,
) -> Outcome:
    """Give every BatchNorm the statistics that inference on these data will see, and judge the result where there are labels to judge by.

    Raises:
        DataError: there are no data, or they are not finite.
        ModelError: the model has no BatchNorm, or fails on the data.
        UsageError: options do not go together, with each other or with this kind of model.
        WorkerError: another process failed.
    """
    started = time.perf_counter()
    how, place = how or Recalibration(), place or Place()
    if how.prior != "auto" and (isinstance(how.prior, bool) or not isinstance(how.prior, (int, float))):
        raise UsageError(f"the prior is {how.prior!r}", hint='it is a number of samples, or "auto"')
    if how.max_drop_pp is not None:
        guard.drop_gate(how.max_drop_pp)  # before any work is done
    needed = "--max-drop" if how.max_drop_pp is not None else "--prior auto" if how.prior == "auto" else None
    used, held_out = as_batches(batches), None
    if how.hold_out or needed:
        used, held_out = guard.split(used, how.hold_out, needed=needed)
        held_out = None if held_out is None else finite(held_out, skip=how.on_bad_batch == "skip")
    if how.augment is not None:
        from bnctl.data.augment import augmented, load_transform

        used = augmented(used, load_transform(how.augment), seed=seed, name=how.augment)
    tried: list[dict[str, float]] = []
    if how.prior == "auto":
        from bnctl.data.holdout import hold_out

        assert held_out is not None
        chosen_by, held_out = hold_out(held_out, 2)
        how, tried = _with_best_prior(model, used, chosen_by, how, place)
    with _naming_what_is_held_out(held_out is not None):
        found = on_engine(model, used, how, place)
    new = replace(model, native=found.model, program=None)
    judged = guard.Judged()
    if held_out is not None:
        judge = guard.judge if place.workers.rank == 0 else None
        own = None if judge is None else judge(model, new, held_out, how.max_drop_pp)
        judged = place.workers.share(own, lambda of_workers: of_workers[0]) or judged
    summary: dict[str, Any] = {
        "found": len(found.sites),
        "recalibrated": sum(s.action == "recalibrated" for s in found.sites),
        "left": sum(s.action == "left" for s in found.sites),
        "samples": found.samples,
        "method": how.method,
    }
    if how.prior:
        summary["prior"] = how.prior
    if found.enough is not None and summary["recalibrated"]:
        summary["enough"] = found.enough
    details: dict[str, Any] = {"standard_error": found.standard_error, "skipped_batches": found.skipped}
    if tried:
        details["priors"] = tried
    report = Report(
        "recalibrate",
        Artifact(model.word, model.sha256),
        sites=tuple(_site(site) for site in found.sites),
        summary=summary,
        details={**details, **judged.details()},
        notes=(*_notes(found, how, judged), *judged.notes),
        elapsed_s=time.perf_counter() - started,
        exit_code=judged.exit_code,
    )
    return Outcome(new, report)


def run_recalibrate(word: str, target: Target, setup: Setup, how: Recalibration) -> Report:
    """The command: recalibrate a model and write it, if the guard lets it pass."""
    started = time.perf_counter()
    with _workers() as workers:
        if (setup.data or "").startswith("random:") and not target.dry_run:
            raise UsageError(
                f"{setup.data} is noise, and so would be the statistics of it",
                hint="give data like those that the model will see; with --dry-run, noise shows what the command takes",
            )
        model = setup.open(word)
        target.check(model.kind)
        batches = repeated(as_batches(setup.batches()), setup.seed)
        partial = Partial(_partial_path(target), _about(model, setup, how))
        if workers.rank == 0 and not how.resume:
            partial.require_place(force=target.force)
        anew = how.resume and not (partial.path is not None and partial.path.exists())
        device = setup.device if setup.device == "cpu" or workers.size == 1 else f"cuda:{_local_rank()}"
        place = Place(device, setup.threads, workers, partial, setup.progress)
        outcome = recalibrate_model(model, batches, how, place, seed=setup.seed)
        report = outcome.report
        if anew:
            report = replace(
                report, notes=(*report.notes, f"there was no {partial.path} to resume from: this was a whole run")
            )
        if workers.rank == 0 and report.exit_code == 0:
            report = replace(report, output=target.save(outcome.model, first_of(batches)))
        if workers.rank == 0:
            partial.remove()
    return replace(report, elapsed_s=time.perf_counter() - started)


def _with_best_prior(
    model: Model, used: Batches, chosen_by: Batches, how: Recalibration, place: Place
) -> tuple[Recalibration, list[dict[str, float]]]:
    """The prior with which samples held out are recognised best, and what was tried; of equals, the one that changes the model least."""
    place = replace(place, partial=Partial())
    tried: list[dict[str, float]] = []
    samples = 0
    for weight in WEIGHTS:
        prior = round(samples * weight / (1 - weight))
        found = on_engine(model, used, replace(how, prior=float(prior), resume=False), place)
        samples = found.samples
        accuracy = 0.0
        if place.workers.rank == 0:
            candidate = replace(model, native=found.model, program=None)
            rows = guard.accuracy_of([model, candidate], chosen_by, gated=True).rows
            if not rows:
                raise UsageError(
                    "--prior auto: the model has no output of class scores, (N, classes)", hint="give a number"
                )
            accuracy = rows[0].candidate_accuracy
        tried.append({"prior": prior, "accuracy": place.workers.share(accuracy, lambda of_workers: of_workers[0])})
    best = max(tried, key=lambda one: (one["accuracy"], one["prior"]))
    return replace(how, prior=float(best["prior"])), tried


def _notes(found: Recalibrated[Any], how: Recalibration, judged: guard.Judged) -> Iterator[str]:
    if not judged.rows:
        yield "recalibration changes the function: check accuracy with bnctl bench before you ship it"
    if found.enough is False:
        yield f"the data were too few for --until {how.until:g}: the worst channel's mean is known to {found.standard_error:.3g} standard deviations"
    elif found.enough is None and math.isinf(found.standard_error):
        yield "a single sample says nothing about how well the means are known"
    elif found.enough is None and found.standard_error > 1.1 * FEW:
        yield (
            f"few data: the worst channel's mean is known to {found.standard_error:.2g} standard deviations; for {FEW:g} it takes about "
            f"{math.ceil(found.samples * (found.standard_error / FEW) ** 2):,} samples (--until {FEW:g} stops when they are enough)"
        )
    if found.skipped:
        yield f"{len(found.skipped)} batches hold NaN or infinity and were left out: {', '.join(map(str, found.skipped[:10]))}"
    dead = sum(site.dead_channels for site in found.sites)
    if dead:
        yield f"{dead} channels do not vary at all on these data: their variance is 0, and eps alone keeps them finite"
    if not any(site.action == "recalibrated" for site in found.sites):
        yield "no layer was recalibrated: the reasons stand beside the layers"
    yield from _doubts(found, how)
    if judged.gate is not None and not judged.passed:
        yield f"nothing was written: {judged.gate.detail}"


def _doubts(found: Recalibrated[Any], how: Recalibration) -> Iterator[str]:
    """What drift and self-consistency say of the result, where there is nothing else to judge it by."""
    done = [site for site in found.sites if site.action == "recalibrated"]
    apart = max(done, key=lambda site: site.self_consistency or 0.0, default=None)
    if apart is not None and (apart.self_consistency or 0.0) > APART and not how.prior and apart.code is None:
        cause = {
            "exact": "the model keeps something from call to call, or draws random numbers",
            "batch": "with batches of this size, inference sees other statistics: use the exact method, or larger batches",
            "ema": "averages of a few batches lag behind: use the exact method, or more batches",
        }[how.method]
        yield f"{apart.name} is off by {apart.self_consistency:.2g} from what inference sees (self-consistency): {cause}"
    moved = max(
        (site for site in done if site.drift), key=lambda site: site.drift.mean if site.drift else 0.0, default=None
    )
    if moved is not None and moved.drift is not None and moved.drift.mean > FAR:
        yield f"the statistics of {moved.name} moved far (drift {moved.drift.mean:.2g} nats): are the data preprocessed as in training?"


@contextmanager
def _naming_what_is_held_out(held_out: bool) -> Iterator[None]:
    """A model that takes batches of one size only fails where some samples of each are held out."""
    try:
        yield
    except (DataError, ModelError) as error:
        if held_out and re.search(r"fails on inputs|expects|does not run", error.message):
            error.hint = f"{error.hint or ''}; batches lack the samples that are held out to judge the result (--hold-out 0: none)".lstrip(
                "; "
            )
        raise


@contextmanager
def _workers() -> Iterator[Workers]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    from bnctl.engines.torch.recalibration.group import joined

    with joined() as workers:
        yield workers


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _partial_path(target: Target) -> Path | None:
    return None if target.path is None else target.path.with_name(f"{target.path.name}.partial")


def _about(model: Model, setup: Setup, how: Recalibration) -> dict[str, Any]:
    """What decides on the result: a run goes on only from one on the same."""
    return {
        "model": model.sha256 or model.word,
        "model arguments": dict(setup.model_args),
        "factory": setup.factory,
        "weights": _fingerprint(model),
        "data": setup.data,
        "data file": _stamp(setup.data),
        "inputs": [str(spec) for spec in setup.inputs],
        "preprocess": None if setup.preprocess is None else setup.preprocess.read_text(encoding="utf-8"),
        "batch size": setup.batch_size,
        "limit": setup.limit,
        "seed": setup.seed,
        "method": how.method,
        "where": list(how.selection.where),
        "skip": list(how.selection.skip),
        "prior": how.prior,
        "until": how.until,
        "bad batches": how.on_bad_batch,
        "autocast": how.autocast,
        "hold out": how.hold_out,
        "augment": how.augment,
    }


def _fingerprint(model: Model) -> str | None:
    """A digest of a torch model's parameters and buffers; an ONNX model has that of its file, and here sizes and times of those with its external data."""
    native: Any = model.native
    if model.kind == "onnx":
        import onnx_ir

        tensors = (value.const_value for value in native.graph.initializers.values())
        files = sorted({str(tensor.path) for tensor in tensors if isinstance(tensor, onnx_ir.ExternalTensor)})
        return "; ".join(f"{file}: {_stamp(file)}" for file in files) or None
    import torch

    digest = hashlib.sha256()
    for name, value in native.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


LOOKED_AT = 10_000
"""Of a folder of images, so many are asked for size and time: a million takes long over a network."""


def _stamp(word: str | None) -> str | None:
    """Names, sizes and times of the files with data, which may be written anew under their names; None for data that are no files."""
    files = [] if word is None else data_files(word)
    if not files:
        return None
    digest = hashlib.sha256("\n".join(map(str, files)).encode())
    total = 0
    for file in files[:: -(-len(files) // LOOKED_AT)]:
        status = file.stat()
        total += status.st_size
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return f"{len(files)} files, {total} bytes, {digest.hexdigest()[:16]}"


def _site(site: SiteStatistics) -> Site:
    drift = None if site.drift is None else asdict(site.drift)
    details = {
        "drift": drift,
        "self_consistency": site.self_consistency,
        "standard_error": site.standard_error,
        "channels": site.channels,
        "count": site.count,
        "calls": site.calls,
        "dead_channels": site.dead_channels,
    }
    return Site(site.name, site.action, (), site.code, site.reason, details)
