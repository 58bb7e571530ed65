"""What a recalibration is told, and how it is handed to the engine of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bnctl.commands.setup import Progress, no_progress
from bnctl.errors import UsageError
from bnctl.recalibration.method import Method
from bnctl.recalibration.partial import Partial
from bnctl.recalibration.workers import Alone, Workers
from bnctl.selection import Selection

if TYPE_CHECKING:
    from bnctl.data.batches import Batches
    from bnctl.models.model import Model
    from bnctl.recalibration.statistics import Recalibrated


@dataclass(frozen=True)
class Recalibration:
    """How to recalibrate.

    Args:
        method: see :func:`bnctl.engines.torch.recalibrate.recalibrate`.
        selection: which layers.
        prior: old statistics count as so many samples; "auto": the number with the best accuracy on samples held out.
        until: standard error of the means, in standard deviations, at which the data are enough.
        on_bad_batch: what to do about NaN and infinity in the data.
        memory_bytes: what paused forward passes may hold; None: half of what is free.
        autocast: type of operators that do not mind: "bf16" or "fp16".
        hold_out: one labelled sample in so many judges the result and is not used for it; 0: none.
        max_drop_pp: most that accuracy may fall; else nothing is written.
        augment: ``package.module:callable``, applied to each sample.
        resume: go on where an interrupted run stopped.
    """

    method: Method = "exact"
    selection: Selection = field(default_factory=Selection)
    prior: float | Literal["auto"] = 0.0
    until: float | None = None
    on_bad_batch: Literal["refuse", "skip"] = "refuse"
    memory_bytes: int | None = None
    autocast: Literal["bf16", "fp16"] | None = None
    hold_out: int = 0
    max_drop_pp: float | None = None
    augment: str | None = None
    resume: bool = False


@dataclass(frozen=True)
class Place:
    """Where the work is done.

    Args:
        device: "cpu" or "cuda".
        threads: batches, or operators, that are run at a time; None: as many as the runtime takes.
        workers: processes that share the batches.
        partial: keeps what is known, for a run that is interrupted.
        progress: is told how far it is.
    """

    device: str = "cpu"
    threads: int | None = None
    workers: Workers = field(default_factory=Alone)
    partial: Partial = field(default_factory=Partial)
    progress: Progress = no_progress


def on_engine(model: Model, batches: Batches, how: Recalibration, place: Place) -> Recalibrated[Any]:
    """New statistics, by the engine of the model's kind; the prior is a number by now."""
    assert how.prior != "auto"
    if model.kind == "onnx":
        return _on_onnx(model, batches, how, place)
    import torch

    from bnctl.engines.torch.copies import workable
    from bnctl.engines.torch.recalibrate import recalibrate

    module = workable(model.native, model.word) if isinstance(model.native, torch.fx.GraphModule) else model.native
    assert isinstance(module, torch.nn.Module)
    return recalibrate(
        module,
        batches,
        method=how.method,
        where=how.selection.where or None,
        skip=how.selection.skip or None,
        prior=how.prior,
        until=how.until,
        device=place.device,
        threads=place.threads,
        autocast=None if how.autocast is None else {"bf16": torch.bfloat16, "fp16": torch.float16}[how.autocast],
        on_bad_batch=how.on_bad_batch,
        progress=place.progress,
        memory_bytes=how.memory_bytes,
        workers=place.workers,
        partial_file=place.partial,
        resume=how.resume,
    )


def _on_onnx(model: Model, batches: Batches, how: Recalibration, place: Place) -> Recalibrated[Any]:
    given = {
        "--autocast": how.autocast is not None,
        "torchrun": place.workers.size > 1,
        "--device cuda": place.device != "cpu",
    }
    for option, is_given in given.items():
        if is_given:
            raise UsageError(
                f"{option} is for torch models, and {model.word} is an ONNX file",
                hint=f"run without {option}, or recalibrate before the export",
            )
    from bnctl.engines.onnx.recalibrate import recalibrate

    assert how.prior != "auto"
    native: Any = model.native
    return recalibrate(
        native,
        batches,
        method=how.method,
        where=how.selection.where or None,
        skip=how.selection.skip or None,
        prior=how.prior,
        until=how.until,
        threads=place.threads or 1,
        progress=place.progress,
        memory_bytes=how.memory_bytes,
        on_bad_batch=how.on_bad_batch,
        name=model.word,
        partial_file=place.partial,
        resume=how.resume,
    )
