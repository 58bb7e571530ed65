"""A whole bench: accuracy, latency, gates, one result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnctl.bench.accuracy import Accuracy, AccuracyRow, AgreementRow, measure_accuracy
from bnctl.bench.gates import Gate, GateResult, evaluate, latency_limit, parse_gate
from bnctl.bench.latency import LatencyRow, RunProcess, free_gain_note, measure_latency
from bnctl.bench.spawn import run_worker
from bnctl.bench.spec import BenchModel, LatencyOptions, Progress
from bnctl.errors import DataError, UsageError
from bnctl.stats.verdict import Verdict, worst

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.runtime.runner import Runner

OpenRunner = Callable[[BenchModel], "Runner"]


@dataclass(frozen=True)
class BenchResult:
    """What a bench found.

    Attributes:
        verdict: the worst of the gates; "pass" where there are none: nothing was asked.
        latency: one row per candidate and runtime; empty if it was not measured.
        accuracy: one row per candidate and metric; empty without labels.
        agreement: one row per candidate; empty without class scores.
        gates: one result per gate.
        notes: what a reader should know, in sentences.
    """

    verdict: Verdict
    latency: tuple[LatencyRow, ...]
    accuracy: tuple[AccuracyRow, ...]
    agreement: tuple[AgreementRow, ...]
    gates: tuple[GateResult, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The bench part of the report."""
        return {
            "verdict": self.verdict,
            "latency": [row.to_dict() for row in self.latency],
            "accuracy": [row.to_dict() for row in self.accuracy],
            "agreement": [row.to_dict() for row in self.agreement],
            "gates": [gate.to_dict() for gate in self.gates],
            "notes": list(self.notes),
        }


def run_bench(
    models: Sequence[BenchModel],
    data: Iterable[Batch],
    *,
    gates: Sequence[str] = (),
    accuracy: bool = True,
    latency: bool = True,
    options: LatencyOptions | None = None,
    progress: Progress = lambda stage, done, planned: None,
    open_runner: OpenRunner | None = None,
    run_process: RunProcess = run_worker,
) -> BenchResult:
    """Measure candidates against a baseline and judge the gates.

    Accuracy comes first: it is what fails early when data and models do not fit. Latency is timed on the first batch
    of the data.

    Args:
        models: the baseline, then at least one candidate.
        data: batches; gone through once per part that is measured.
        gates: expressions, see :mod:`bnctl.bench.gates`.
        accuracy: whether to measure accuracy and label flips.
        latency: whether to measure latency.
        options: how latency is measured.
        progress: called as ``progress(stage, done, planned)``; planned is 0 where it is not known.
        open_runner: opens a model for the accuracy pass.
        run_process: runs one latency worker.

    Raises:
        UsageError: no candidate, nothing to measure, a malformed gate, or a gate on what is not measured or is
            ambiguous.
        DataError: no data, or data that do not fit the models.
        ModelError: a model cannot be loaded or run, or crashed a worker.
    """
    if len(models) < 2:
        raise UsageError("bench compares: a baseline and at least one candidate are needed", hint="name two models")
    if not (accuracy or latency):
        raise UsageError("bench: nothing to measure", hint="leave accuracy or latency on")
    parsed = [parse_gate(gate) for gate in gates]
    options = options or LatencyOptions()
    batch = next(iter(data), None)
    if batch is None:
        raise DataError("the data hold no batch", hint="give --data that is not empty")
    _require_measured(parsed, accuracy=accuracy, latency=latency, labels=batch.labels is not None)

    seen = Accuracy()
    if accuracy:
        opening = open_runner or (lambda model: _open_runner(model, options))
        gated = any(not _on_latency(gate) for gate in parsed)
        seen = _accuracy(models, data, opening, progress, gated=gated)
    # Before latency, which takes minutes: what these gates limit may not have been there to measure.
    others = {gate: evaluate(gate, (), seen.rows, seen.agreement) for gate in parsed if not _on_latency(gate)}
    latency_rows: tuple[LatencyRow, ...] = ()
    if latency:
        limit = latency_limit(parsed)
        latency_rows = measure_latency(models, batch, options, run_process=run_process, limit=limit, progress=progress)
    results = tuple(others[gate] if gate in others else evaluate(gate, latency_rows, (), ()) for gate in parsed)
    return BenchResult(
        verdict=worst([result.verdict for result in results]),
        latency=latency_rows,
        accuracy=seen.rows,
        agreement=seen.agreement,
        gates=results,
        notes=(*seen.notes, *free_gain_note(latency_rows)),
    )


def _accuracy(
    models: Sequence[BenchModel], data: Iterable[Batch], opening: OpenRunner, progress: Progress, *, gated: bool
) -> Accuracy:
    def counted() -> Iterator[Batch]:
        for number, batch in enumerate(data, start=1):
            yield batch
            progress("accuracy", number, 0)

    words, runners = [model.word for model in models], [opening(model) for model in models]
    return measure_accuracy(words, runners, counted(), gated=gated)


def _open_runner(model: BenchModel, options: LatencyOptions) -> Runner:
    from bnctl.runtime import open_runner

    return open_runner(model.open(), threads=options.threads, device=options.device)


def _on_latency(gate: Gate) -> bool:
    return gate.metric == "latency.ratio"


def _require_measured(gates: Sequence[Gate], *, accuracy: bool, latency: bool, labels: bool) -> None:
    """Refuse, before anything runs, a gate on what will not be measured."""
    for gate in gates:
        problem = None
        if _on_latency(gate):
            problem = None if latency else "latency is off"
        elif not accuracy:
            problem = "accuracy is off"
        elif gate.metric != "flips" and not labels:
            problem = "the data have no labels"
        if problem:
            raise UsageError(f"gate {gate.expression!r}: {problem}", hint="drop the gate, or measure what it limits")
