"""Latency of candidates against a baseline, with an interval that holds on a noisy machine.

In each of several fresh processes all models run in turns (:mod:`bnctl.bench.timing`), the baseline twice. A process
gives one number per candidate, ``log(median_candidate / median_baseline)``, and Student's t over the processes gives
the interval (:mod:`bnctl.stats.ratio`). The second copy of the baseline is an A/A control: what it seems to differ by
is the noise floor.

Processes are added until the interval is as narrow as asked. The decision to go on looks at the width only, never at
where the interval lies. In simulation (normal noise, 5 to 15 processes) the 95 % interval then covers the truth in 92
to 96 % of cases, lowest where the precision is reached in the middle of that range. So that this does not make the
gate cry wolf, a failure has to be seen again in as many fresh processes, judged on their own.

ONNX Runtime folds Conv+BN itself. ONNX models are therefore timed with its optimisations on (what users get, and what
gates judge) and off (what the file alone is worth).
"""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnctl.bench.spec import BenchModel, LatencyOptions, ProcessResult, Progress, Turns, WorkerSpec
from bnctl.bench.timing import typical_ns
from bnctl.errors import DataError
from bnctl.stats.ratio import RatioInterval, processes_needed, ratio_interval
from bnctl.stats.verdict import Verdict, judge

if TYPE_CHECKING:
    from bnctl.data.batches import Batch

RunProcess = Callable[[WorkerSpec], ProcessResult]

# The 99th percentile of fewer calls than this is little more than their maximum.
MIN_CALLS_FOR_P99 = 100
_FIRST_CANDIDATE = 2  # instances in a process: baseline, its second copy, candidates


@dataclass(frozen=True)
class Percentiles:
    """Call times of one model over all processes, in milliseconds; p99 is None below 100 calls."""

    p50_ms: float
    p99_ms: float | None


@dataclass(frozen=True)
class LatencyRow:
    """One candidate against the baseline, under one runtime.

    Attributes:
        runtime: "torch", "onnxruntime" or "onnxruntime (no optimisation)"; two of them where the models differ in kind.
        optimised: whether this is what users get; gates judge these rows only.
        baseline: the baseline's word.
        candidate: the candidate's word.
        threads: of each model.
        device: "cpu" or "cuda".
        batch: samples per call.
        interval: the ratio, candidate over baseline.
        control: the same for the second copy of the baseline.
        baseline_time: its percentiles.
        candidate_time: its percentiles.
        confirmation: the ratio in the fresh processes that were started because a gate failed; None if none did.
    """

    runtime: str
    optimised: bool
    baseline: str
    candidate: str
    threads: int
    device: str
    batch: int
    interval: RatioInterval
    control: RatioInterval
    baseline_time: Percentiles
    candidate_time: Percentiles
    confirmation: RatioInterval | None = None

    @property
    def noise_floor(self) -> float:
        """The largest relative difference that the A/A interval still allows between two copies of the same model."""
        return max(self.control.high, 1 / self.control.low) - 1

    def verdict(self, limit: float) -> Verdict:
        """Whether the ratio is at most ``limit``; a failure counts only if the fresh processes show it, too."""
        verdict = judge(self.interval.low, self.interval.high, limit)
        again = self.confirmation
        if verdict == "fail" and again is not None and judge(again.low, again.high, limit) != "fail":
            return "inconclusive"
        return verdict

    def to_dict(self) -> dict[str, Any]:
        """One entry of the report's ``latency``."""
        return {
            "runtime": self.runtime,
            "baseline": self.baseline,
            "candidate": self.candidate,
            "threads": self.threads,
            "device": self.device,
            "batch": self.batch,
            "processes": self.interval.processes,
            "ratio": self.interval.ratio,
            "ci95": [self.interval.low, self.interval.high],
            "noise_floor": self.noise_floor,
            "p50_ms": {"baseline": self.baseline_time.p50_ms, "candidate": self.candidate_time.p50_ms},
            "p99_ms": {"baseline": self.baseline_time.p99_ms, "candidate": self.candidate_time.p99_ms},
            "gated": self.optimised,
        }


def measure_latency(
    models: Sequence[BenchModel],
    batch: Batch,
    options: LatencyOptions,
    *,
    run_process: RunProcess,
    limit: float | None = None,
    progress: Progress = lambda stage, done, planned: None,
) -> tuple[LatencyRow, ...]:
    """Time every candidate against the baseline.

    Args:
        models: the baseline, then the candidates.
        batch: the inputs of every call.
        options: how to measure.
        run_process: starts one worker, usually :func:`bnctl.bench.spawn.run_worker`.
        limit: the strictest gate on the ratio: a row that fails it is measured again in fresh processes.
        progress: called after each process.

    Raises:
        ModelError: a model cannot be loaded, run, or crashes its worker.
        DataError: the batch cannot be handed to another process.
    """
    with tempfile.TemporaryDirectory(prefix="bnctl-bench-") as folder:
        inputs = Path(folder, "inputs")
        try:
            inputs.write_bytes(pickle.dumps((batch.args, batch.kwargs)))
        except Exception as error:  # pickle's errors share no base class
            raise DataError(f"this batch cannot be handed to a worker process: {error}", hint="use arrays") from error
        results: list[ProcessResult] = []

        def extend(processes: int) -> None:
            for number in range(len(results), processes):
                result = str(Path(folder, f"result-{number}"))
                spec = WorkerSpec(tuple(models), str(inputs), result, options, options.seed + number)
                results.append(run_process(spec))
                progress("latency", len(results), processes)

        extend(options.processes)
        while (wanted := _wanted(results, options)) > len(results):
            extend(wanted)
        rows = _rows(models, batch.size, results, options)
        if limit is not None and any(row.optimised and row.verdict(limit) == "fail" for row in rows):
            first = len(results)
            extend(first + options.processes)
            again = _rows(models, batch.size, results[first:], options)
            pooled = _rows(models, batch.size, results, options)
            rows = [replace(row, confirmation=fresh.interval) for row, fresh in zip(pooled, again, strict=True)]
    return tuple(rows)


def free_gain_note(rows: Sequence[LatencyRow]) -> list[str]:
    """A note for every candidate that is faster only while ONNX Runtime's own optimisations are off."""
    optimised = {row.candidate: row for row in rows if row.optimised}
    return [
        f"{row.candidate}: faster only with ONNX Runtime's optimisations off ({row.interval.ratio:.3f}x); "
        f"with them on the runtime does the same by itself ({optimised[row.candidate].interval.ratio:.3f}x)"
        for row in rows
        if not row.optimised and row.interval.high < 1 <= optimised[row.candidate].interval.high
    ]


def _wanted(results: Sequence[ProcessResult], options: LatencyOptions) -> int:
    """How many processes in all the widest interval calls for; at most ``max_processes``."""
    needed = max(processes_needed(logs, options.precision) for logs in _log_ratios(results).values())
    return min(options.max_processes, max(needed, len(results)))


def _log_ratios(results: Sequence[ProcessResult]) -> dict[tuple[int, int], list[float]]:
    """Per mode and instance (all but the baseline): one log ratio per process."""
    ratios: dict[tuple[int, int], list[float]] = {}
    for result in results:
        for mode, turns in enumerate(result.turns):
            baseline, *others = (typical_ns(calls) for calls in turns.calls_ns)
            for instance, value in enumerate(others, start=1):
                ratios.setdefault((mode, instance), []).append(math.log(value / baseline))
    return ratios


def _rows(
    models: Sequence[BenchModel], batch: int, results: Sequence[ProcessResult], options: LatencyOptions
) -> list[LatencyRow]:
    ratios = {key: ratio_interval(logs) for key, logs in _log_ratios(results).items()}
    rows = []
    for mode, turns in enumerate(results[0].turns):
        for index, candidate in enumerate(models[1:]):
            runtime = _runtime(turns, index + 1)
            if runtime is None:
                continue
            instance = _FIRST_CANDIDATE + index
            rows.append(
                LatencyRow(
                    runtime=runtime,
                    optimised=turns.optimised,
                    baseline=models[0].word,
                    candidate=candidate.word,
                    threads=options.threads,
                    device=options.device,
                    batch=batch,
                    interval=ratios[mode, instance],
                    control=ratios[mode, 1],
                    baseline_time=_percentiles(results, mode, 0),
                    candidate_time=_percentiles(results, mode, instance),
                )
            )
    return rows


def _runtime(turns: Turns, candidate: int) -> str | None:
    """What to call the runtime of a pair; None if the mode makes no difference to it."""
    pair = (turns.kinds[0], turns.kinds[candidate])
    if not turns.optimised and "onnx" not in pair:
        return None
    onnx = "onnxruntime" if turns.optimised else "onnxruntime (no optimisation)"
    return " -> ".join(dict.fromkeys(onnx if kind == "onnx" else kind for kind in pair))


def _percentiles(results: Sequence[ProcessResult], mode: int, instance: int) -> Percentiles:
    calls = list(chain.from_iterable(turn for r in results for turn in r.turns[mode].calls_ns[instance]))
    p50, p99 = np.percentile(calls, [50, 99]) / 1e6
    return Percentiles(float(p50), float(p99) if len(calls) >= MIN_CALLS_FOR_P99 else None)
