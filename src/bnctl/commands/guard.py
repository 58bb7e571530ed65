"""The guard of recalibration: accuracy before and after, on samples that were not used for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnctl.bench.accuracy import Accuracy, AccuracyRow, measure_accuracy
from bnctl.bench.gates import Gate, GateResult, evaluate, exit_code, parse_gate
from bnctl.data.batches import first_of
from bnctl.data.finite import NotFiniteError
from bnctl.data.holdout import hold_out
from bnctl.errors import DataError, ExitCode, UsageError

if TYPE_CHECKING:
    from bnctl.data.batches import Batches
    from bnctl.models.model import Model

HOLD_OUT = 5
"""One labelled sample in so many judges the result."""


@dataclass(frozen=True)
class Judged:
    """What the guard found.

    Attributes:
        rows: top-1 and top-5 accuracy before and after; empty where it could not be measured.
        gate: the verdict on ``--max-drop``; None without.
        notes: what a person should know.
    """

    rows: tuple[AccuracyRow, ...] = ()
    gate: GateResult | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the result may be written."""
        return self.gate is None or self.gate.verdict == "pass"

    @property
    def exit_code(self) -> ExitCode:
        """0 for pass or no gate, 1 for fail, 3 for inconclusive."""
        return ExitCode.OK if self.gate is None else exit_code(self.gate.verdict)

    def details(self) -> dict[str, Any]:
        """The report's fields ``accuracy``, ``gates`` and ``verdict``."""
        found: dict[str, Any] = {"accuracy": [row.to_dict() for row in self.rows]} if self.rows else {}
        return found if self.gate is None else {**found, "gates": [self.gate.to_dict()], "verdict": self.gate.verdict}


def split(batches: Batches, one_in: int, *, needed: str | None) -> tuple[Batches, Batches | None]:
    """Samples to recalibrate on, and labelled ones to judge by; None where there are no labels, or none shall be held out.

    Args:
        batches: the data.
        one_in: hold one sample in so many out; 0 for none.
        needed: the option that cannot do without them.

    Raises:
        UsageError: they are needed, and there are none.
    """
    labelled = first_of(batches).labels is not None
    if needed and not (labelled and one_in):
        raise UsageError(
            f"{needed} compares accuracies, and " + ("--hold-out is 0" if labelled else "the data have no labels"),
            hint="give data with labels, and hold some samples out"
            if labelled
            else "give data with labels (arrays x and y, or one folder per class)",
        )
    if not (labelled and one_in):
        return batches, None
    used, held_out = hold_out(batches, one_in)
    if next(iter(held_out), None) is None or next(iter(used), None) is None:
        if needed:
            raise UsageError(
                f"{needed}: the data are too few to hold one sample in {one_in} out",
                hint="give more data, or another --hold-out",
            )
        return batches, None
    return used, held_out


def judge(before: Model, after: Model, held_out: Batches, max_drop_pp: float | None) -> Judged:
    """Accuracy of both models on the samples held out.

    Args:
        before: the model as it came.
        after: the recalibrated one.
        held_out: labelled samples.
        max_drop_pp: most that top-1 accuracy may fall, in percentage points, with the interval's end; None for no gate.

    Raises:
        UsageError: there is a gate, and nothing to judge it by.
    """
    try:
        accuracy = accuracy_of([before, after], held_out, gated=max_drop_pp is not None)
    except NotFiniteError:
        raise
    except DataError as error:
        if max_drop_pp is not None:
            raise
        return Judged(notes=(f"accuracy was not measured: {error}",))
    if not accuracy.rows:
        if max_drop_pp is not None:
            raise UsageError(
                "--max-drop: the model has no output of class scores, (N, classes)",
                hint="leave it out for other models",
            )
        return Judged(notes=("accuracy was not measured: the model has no output of class scores",))
    gate = None if max_drop_pp is None else evaluate(drop_gate(max_drop_pp), (), accuracy.rows, ())
    notes = []
    top1 = accuracy.rows[0].paired
    if top1.high < 0:
        notes.append(
            f"accuracy on the samples held out fell by {-100 * top1.difference:.2f} points (95 % interval {-100 * top1.high:.2f} to {-100 * top1.low:.2f}): "
            "do not ship this; recalibrate on data like those of training (--augment), mix the old statistics in (--prior), or leave the model as it was"
        )
    return Judged(accuracy.rows, gate, (*accuracy.notes, *notes))


def drop_gate(max_drop_pp: float) -> Gate:
    """The gate of ``--max-drop``.

    Raises:
        UsageError: it is no number.
    """
    if not math.isfinite(max_drop_pp):
        raise UsageError(
            f"--max-drop {max_drop_pp}: not a number of percentage points", hint="for example --max-drop 0.5"
        )
    return parse_gate(f"top1.drop<={max_drop_pp:f}".rstrip("0").rstrip("."))


def accuracy_of(models: list[Model], batches: Batches, *, gated: bool) -> Accuracy:
    """Accuracy of models on labelled samples, the first being the baseline; for `gated` see :func:`bnctl.bench.accuracy.measure_accuracy`."""
    from bnctl.runtime import open_runner

    names = ["before", *("after" if len(models) == 2 else f"candidate {number}" for number in range(1, len(models)))]
    return measure_accuracy(names, [open_runner(model) for model in models], batches, gated=gated)
