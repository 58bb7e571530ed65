"""The bench: timing in turns, verdicts on fake machines, gates, and one real run with two processes."""

from __future__ import annotations

import gc
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bnctl.bench import spawn
from bnctl.bench.accuracy import Accuracy, hits, measure_accuracy
from bnctl.bench.gates import METRICS, exit_code, parse_gate
from bnctl.bench.latency import free_gain_note, measure_latency
from bnctl.bench.run import run_bench
from bnctl.bench.spawn import run_worker
from bnctl.bench.spec import BenchModel, LatencyOptions, ProcessResult, Turns, WorkerSpec
from bnctl.bench.timing import Schedule, time_in_turns, typical_ns
from bnctl.data.batches import Batch
from bnctl.errors import BnctlError, DataError, ExitCode, ModelError, UsageError

SOURCES = str(Path(__file__).parents[1] / "src")


class FakeClock:
    """Time that passes only when a fake model runs."""

    def __init__(self) -> None:
        self.now = 0
        self.order: list[str] = []

    def __call__(self) -> int:
        return self.now

    def model(self, name: str, ns: Callable[[], int]) -> Callable[[], None]:
        def call() -> None:
            assert not gc.isenabled()
            self.order.append(name)
            self.now += ns()

        return call


class TestTiming:
    SCHEDULE = Schedule(block_ns=1000, rounds=8, budget_ns=10**9)

    def test_turns_are_as_long_as_asked_and_interleaved(self):
        clock = FakeClock()
        calls = [clock.model("slow", lambda: 500), clock.model("fast", lambda: 10)]
        slow, fast = time_in_turns(calls, self.SCHEDULE, random.Random(0), clock)
        assert [len(turn) for turn in slow] == [2] * 8
        assert [len(turn) for turn in fast] == [100] * 8
        assert (typical_ns(slow), typical_ns(fast)) == (500, 10)
        turns = "".join(clock.order).replace("fast" * 100, "F").replace("slow" * 2, "S")
        rounds = {turns[i : i + 2] for i in range(6, len(turns), 2)}  # after three calls of each to warm up
        assert rounds == {"SF", "FS"}

    def test_the_first_slow_calls_are_not_counted(self):
        clock = FakeClock()
        durations = iter([10**6, 5000, *[100] * 10**4])
        (turns,) = time_in_turns([clock.model("m", lambda: next(durations))], self.SCHEDULE, random.Random(0), clock)
        assert {ns for turn in turns for ns in turn} == {100}

    def test_a_slow_model_still_gets_three_turns(self):
        clock = FakeClock()
        calls = [clock.model("m", lambda: 10**9)]
        (turns,) = time_in_turns(calls, Schedule(1000, 15, 10**9), random.Random(0), clock)
        assert [len(turn) for turn in turns] == [1, 1, 1]

    def test_the_median_ignores_a_hiccup(self):
        assert typical_ns([[10, 10, 900], [10, 11, 12], [10, 10, 10]]) == 10

    def test_the_collector_comes_back_when_a_model_raises(self):
        def broken() -> None:
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            time_in_turns([broken], self.SCHEDULE, random.Random(0))
        assert gc.isenabled()


class FakeMachine:
    """Worker processes whose models take given times, with noise between processes and between calls."""

    def __init__(
        self, *ms: float, noise: float = 0.005, kinds: str = "torch", plain_ms: tuple[float, ...] = ()
    ) -> None:
        self.modes = [(True, ms)] + ([(False, plain_ms)] if plain_ms else [])
        self.noise = noise
        self.kinds = tuple(kinds for _ in ms)
        self.processes = 0

    def __call__(self, spec: WorkerSpec) -> ProcessResult:
        self.processes += 1
        rng = np.random.default_rng(spec.seed)
        return ProcessResult(tuple(Turns(mode, self.kinds, self.calls(ms, rng)) for mode, ms in self.modes))

    def calls(self, ms: tuple[float, ...], rng: np.random.Generator) -> Any:
        machine = rng.lognormal(0, 0.3)  # this process is slow or fast as a whole
        typical = (machine * value * rng.lognormal(0, self.noise) for value in (ms[0], *ms))
        return tuple(
            tuple(tuple(int(v) for v in 1e6 * value * rng.lognormal(0, 0.001, 5)) for _ in range(7))
            for value in typical
        )


MODELS = (BenchModel("baseline.onnx"), BenchModel("candidate.onnx"))
BATCH = Batch(args=(np.zeros((4, 2), np.float32),), kwargs={}, labels=None)


def bench(machine: Any, *gates: str, models: tuple[BenchModel, ...] = MODELS, **options: Any) -> Any:
    return run_bench(
        models, [BATCH], gates=gates, accuracy=False, run_process=machine, options=LatencyOptions(**options)
    )


class TestLatencyVerdicts:
    def test_two_copies_never_fail(self):
        verdicts = [bench(FakeMachine(1, 1), "latency.ratio<=1.0", seed=1000 * i).verdict for i in range(40)]
        assert "fail" not in verdicts

    def test_two_copies_pass_with_a_margin(self):
        found = bench(FakeMachine(1, 1), "latency.ratio<=1.05")
        assert found.verdict == "pass"
        assert 0 < found.latency[0].noise_floor < 0.05

    def test_negative_control_twice_as_slow_fails_and_is_confirmed(self):
        machine = FakeMachine(1, 2)
        found = bench(machine, "latency.ratio<=1.05")
        assert found.verdict == "fail"
        row = found.latency[0]
        assert row.interval.ratio == pytest.approx(2, rel=0.05)
        assert row.confirmation.processes == 5
        assert machine.processes == row.interval.processes >= 10
        assert exit_code(found.verdict) == ExitCode.FAILED

    def test_a_wide_interval_is_inconclusive_and_stops_at_the_maximum(self):
        machine = FakeMachine(1, 1.05, noise=0.2)
        found = bench(machine, "latency.ratio<=1.05", max_processes=9)
        assert found.verdict == "inconclusive"
        assert machine.processes == 9
        assert exit_code(found.verdict) == ExitCode.INCONCLUSIVE

    def test_a_failure_that_fresh_processes_do_not_show_is_inconclusive(self):
        class Unlucky(FakeMachine):
            def __call__(self, spec: WorkerSpec) -> ProcessResult:
                self.modes = [(True, (1, 2.0 if self.processes < 5 else 1.0))]
                return super().__call__(spec)

        found = bench(Unlucky(1, 1), "latency.ratio<=1.05", max_processes=5)
        assert found.verdict != "fail"

    def test_more_processes_are_started_for_the_width_only(self):
        quiet, noisy = FakeMachine(1, 2, noise=0.001), FakeMachine(1, 2, noise=0.02)
        assert bench(quiet).latency[0].interval.processes == 5
        assert bench(noisy).latency[0].interval.processes > 5

    def test_without_gates_nothing_is_asked(self):
        assert bench(FakeMachine(1, 5)).verdict == "pass"

    def test_the_worst_candidate_decides(self):
        models = (*MODELS, BenchModel("slow.onnx"))
        found = bench(FakeMachine(1, 0.9, 3), "latency.ratio<=1.05", models=models)
        assert found.verdict == "fail"
        assert "slow.onnx" in found.gates[0].detail
        assert "candidate.onnx" not in found.gates[0].detail

    def test_onnx_is_reported_with_and_without_optimisation_and_judged_with(self):
        machine = FakeMachine(1, 1, kinds="onnx", plain_ms=(2, 1))
        found = bench(machine, "latency.ratio<=1.05")
        optimised, plain = found.latency
        assert (optimised.runtime, plain.runtime) == ("onnxruntime", "onnxruntime (no optimisation)")
        assert plain.interval.ratio == pytest.approx(0.5, rel=0.05)
        assert found.verdict == "pass"
        slower_when_plain = bench(FakeMachine(1, 1, kinds="onnx", plain_ms=(1, 9)), "latency.ratio<=1.05")
        assert slower_when_plain.verdict == "pass"

    def test_a_gain_that_the_runtime_makes_by_itself_is_noted(self):
        noted = bench(FakeMachine(1, 1.01, kinds="onnx", plain_ms=(2, 1)))
        assert "by itself" in noted.notes[0]
        assert not free_gain_note(bench(FakeMachine(1, 0.5, kinds="onnx", plain_ms=(2, 1))).latency)

    def test_the_report_is_json_with_everything_promised(self):
        found = bench(FakeMachine(1, 1), "latency.ratio<=1.05")
        document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert document["verdict"] == "pass"
        row = document["latency"][0]
        assert {"runtime", "threads", "batch", "ratio", "ci95", "noise_floor", "p50_ms", "p99_ms"} <= row.keys()
        assert row["batch"] == 4
        assert set(row["p50_ms"]) == {"baseline", "candidate"}
        assert document["gates"][0].keys() == {"expression", "verdict", "detail"}

    def test_p99_needs_a_hundred_calls(self):
        # 5 processes x 7 turns x 5 calls
        assert bench(FakeMachine(1, 1)).latency[0].candidate_time.p99_ms is not None
        assert bench(FakeMachine(1, 1), processes=2, max_processes=2).latency[0].candidate_time.p99_ms is None

    def test_progress_is_told(self):
        seen: list[tuple[str, int, int]] = []
        measure_latency(
            MODELS, BATCH, LatencyOptions(), run_process=FakeMachine(1, 1), progress=lambda *step: seen.append(step)
        )
        assert seen[0] == ("latency", 1, 5)

    def test_a_batch_that_cannot_cross_over(self):
        with pytest.raises(DataError, match="cannot be handed"):
            run_bench(MODELS, [Batch(args=(lambda: 0,), kwargs={}, labels=None)], accuracy=False)

    @pytest.mark.parametrize("option", [{"processes": 1}, {"threads": 0}, {"max_processes": 2}, {"precision": 0}])
    def test_impossible_options(self, option):
        with pytest.raises(UsageError, match="bench"):
            LatencyOptions(**option)


class TestGateExpressions:
    @given(st.sampled_from(METRICS), st.decimals(0, 100, places=3), st.sampled_from(["", " ", "  "]))
    def test_good_ones(self, metric, limit, space):
        if metric == "latency.ratio" and limit == 0:
            return
        gate = parse_gate(f"{space}{metric}{space}<={space}{limit}{space}")
        assert (gate.metric, gate.limit) == (metric, float(limit))

    @pytest.mark.parametrize(
        ("expression", "column", "message"),
        [
            ("", 1, "no metric"),
            ("latency.ration<=1", 1, "did you mean 'latency.ratio'"),
            ("p99.ratio<=1", 1, "no metric 'p99.ratio'"),
            ("top1.drop", 10, "expected '<=', found the end"),
            ("top1.drop 0.5", 11, "expected '<=', found '0.5'"),
            ("top1.drop>=0.5", 10, "expected '<=', found '>='"),
            ("top1.drop<0.5", 10, "expected '<='"),
            ("top1.drop==0.5", 10, "expected '<='"),
            ("top1.drop<=", 12, "expected a number, found the end"),
            ("top1.drop<=0.5%", 12, "expected a number, found '0.5%'"),
            ("top1.drop<=nan", 12, "expected a number"),
            ("top1.drop<=inf", 12, "expected a number"),
            ("top1.drop<=1e999", 12, "expected a number"),
            ("top1.drop<=0.5 or flips<=1", 16, "nothing may follow"),
            ("latency.ratio<=0", 16, "positive"),
            ("flips<=-1", 8, "not negative"),
        ],
    )
    def test_bad_ones_say_where(self, expression, column, message):
        with pytest.raises(UsageError) as caught:
            parse_gate(expression)
        assert f"column {column}: " in caught.value.message
        assert message in caught.value.message
        assert caught.value.message.splitlines()[-1] == "  " + " " * (column - 1) + "^"
        assert all(metric in str(caught.value.hint) for metric in METRICS)

    @given(st.text(max_size=20))
    def test_anything_else_is_a_usage_error(self, text):
        try:
            assert parse_gate(text).metric in METRICS
        except UsageError as error:
            assert error.exit_code == ExitCode.USAGE

    def test_exit_codes(self):
        assert [exit_code(v) for v in ("pass", "fail", "inconclusive")] == [0, 1, 3]


class Classifier:
    """A runner whose scores are given, by sample number."""

    kind = "torch"
    precision = "float32"

    def __init__(self, scores: NDArray[Any]) -> None:
        self.scores = scores.astype(np.float32)
        self.runs = 0

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        self.runs += 1
        return {"features": np.zeros((batch.size, 1)), "logits": self.scores[batch.args[0]]}


def labelled(labels: NDArray[Any] | None, n: int, size: int = 7) -> Iterator[Batch]:
    for start in range(0, n, size):
        index = np.arange(start, min(n, start + size))
        yield Batch(args=(index,), kwargs={}, labels=None if labels is None else labels[index])


class TestAccuracy:
    def test_counts_match_a_plain_computation(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 10, 100)
        a = rng.normal(size=(100, 10)) + 2 * np.eye(10)[labels]
        b = a + rng.normal(size=(100, 10))
        runners = [Classifier(a), Classifier(b)]
        found = measure_accuracy(["a", "b"], runners, labelled(labels, 100))
        rows, agreement = found.rows, found.agreement
        right_a, right_b = a.argmax(1) == labels, b.argmax(1) == labels
        top1, top5 = rows
        assert (top1.metric, top5.metric) == ("top1", "top5")
        assert (top1.baseline_accuracy, top1.candidate_accuracy) == (right_a.mean(), right_b.mean())
        assert (top1.paired.lost, top1.paired.gained) == ((right_a & ~right_b).sum(), (right_b & ~right_a).sum())
        in_top5 = [label in row.argsort()[-5:] for label, row in zip(labels, b, strict=True)]
        assert top5.candidate_accuracy == np.mean(in_top5)
        assert agreement[0].flips == (a.argmax(1) != b.argmax(1)).sum()
        assert [runner.runs for runner in runners] == [15, 15]
        document = top1.to_dict()
        assert document["discordant"] == document["lost"] + document["gained"]
        json.dumps(document, allow_nan=False)

    @given(st.integers(1, 5), st.integers(0, 10**6))
    def test_hits_agree_with_a_stable_sort(self, k, seed):
        rng = np.random.default_rng(seed)
        scores, labels = rng.integers(0, 4, (20, 6)).astype(float), rng.integers(0, 6, 20)
        order = (-scores).argsort(axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(hits(scores, labels, k), (order == labels[:, None]).any(axis=1))

    def test_nan_is_never_right(self):
        assert not hits(np.array([[np.nan, 1.0], [np.nan, np.nan]]), np.array([1, 0]), 1).any()

    def test_without_labels_there_are_flips_only(self):
        scores = np.eye(3)[np.arange(30) % 3]
        found = measure_accuracy(["a", "b"], [Classifier(scores), Classifier(scores)], labelled(None, 30))
        rows, agreement = found.rows, found.agreement
        assert rows == ()
        assert agreement[0].flips == 0

    def test_few_classes_have_no_top5(self):
        scores = np.eye(5)[np.arange(30) % 5]
        rows = measure_accuracy(["a", "b"], [Classifier(scores)] * 2, labelled(np.arange(30) % 5, 30)).rows
        assert [row.metric for row in rows] == ["top1"]

    def test_data_that_do_not_fit(self):
        scores = np.eye(3)[np.arange(30) % 3]
        pair = [Classifier(scores), Classifier(scores)]
        with pytest.raises(DataError, match="no samples"):
            measure_accuracy(["a", "b"], pair, [])
        with pytest.raises(DataError, match="from 0 to 6"):
            measure_accuracy(["a", "b"], pair, labelled(np.arange(30) % 10, 30))
        mixed = [*labelled(np.zeros(30, int), 7), *labelled(None, 7)]
        with pytest.raises(DataError, match="only 7 of 14"):
            measure_accuracy(["a", "b"], pair, mixed)
        with pytest.raises(DataError, match="b: class scores"):
            measure_accuracy(["a", "b"], [pair[0], Classifier(np.eye(4)[np.arange(30) % 4])], labelled(None, 30))


class Outputs(Classifier):
    """A classifier whose outputs are made of its scores; like a Squeeze, one sample has no batch axis where asked."""

    def __init__(self, scores: NDArray[Any], *, squeezes: bool = False, **factors: float) -> None:
        super().__init__(scores)
        self.factors, self.squeezes = factors, squeezes

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        scores = super().run(batch)["logits"]
        return {name: f * (scores.squeeze() if self.squeezes else scores) for name, f in self.factors.items()}


class TestWhatIsCompared:
    SCORES = np.eye(3)[np.arange(33) % 3] + 0.1

    def measure(self, *runners: Any, labels: Any = None, gated: bool = False) -> Accuracy:
        return measure_accuracy(["a", "b"], runners, labelled(labels, 33, 32), gated=gated)

    def test_nan_on_one_side_is_a_flip(self):
        """``argmax`` of a row of NaN is 0, the class that the baseline predicts."""
        first = np.tile([1.0, 0, 0], (33, 1))
        broken = first.copy()
        broken[:4] = np.nan
        for pair in ([first, broken], [broken, first]):
            found = self.measure(*map(Classifier, pair))
            assert found.agreement[0].flips == 4
            assert found.notes == (f"{'ab'[pair[1] is broken]} returned NaN for 4 of 33 samples",)
        assert self.measure(Classifier(first), Classifier(first)).notes == ()
        both = self.measure(Classifier(broken), Classifier(broken))
        assert both.agreement[0].flips == 0
        assert len(both.notes) == 2
        assert self.measure(Classifier(first), Classifier(broken), gated=True).agreement[0].flips == 4
        for candidate in (first, broken):
            with pytest.raises(DataError, match="a returned NaN for 4 of 33 samples: no gate"):
                self.measure(Classifier(broken), Classifier(candidate), gated=True)

    def test_nan_fails_the_gate_and_is_noted(self):
        first = np.tile([1.0, 0, 0], (50, 1))
        found = accuracy_bench(None, [first, first * np.nan], "flips<=0", n=50)
        assert found.verdict == "fail"
        assert found.notes == ("candidate.onnx returned NaN for 50 of 50 samples",)

    def test_the_judged_output_is_named(self):
        found = self.measure(*[Classifier(self.SCORES)] * 2, labels=np.arange(33) % 3)
        assert {row.to_dict()["output"] for row in (*found.rows, *found.agreement)} == {"logits"}

    def test_several_outputs_of_class_scores_are_noted_and_hold_no_gate(self):
        pair = [Outputs(self.SCORES, embedding=1, y=1), Outputs(self.SCORES, embedding=1, y=-1)]
        found = self.measure(*pair)
        assert (found.agreement[0].output, found.agreement[0].flips) == ("embedding", 0)
        assert found.notes == (
            "a: 2 outputs look like class scores (embedding, y); embedding is judged, the others are not",
        )
        with pytest.raises(UsageError, match=r"a: 2 outputs .*\(embedding, y\)"):
            self.measure(*pair, gated=True)

    @pytest.mark.parametrize("gate", ["flips<=0", "top1.drop<=90"])
    def test_only_gates_on_accuracy_need_one_output(self, gate):
        def run(*gates: str) -> Any:
            runners = iter([Outputs(self.SCORES, e=1, y=1)] * 2)
            data = list(labelled(np.arange(33) % 3, 33))
            return run_bench(
                MODELS,
                data,
                gates=gates,
                open_runner=lambda model: next(runners),
                run_process=FakeMachine(1, 1),
                options=LatencyOptions(processes=2, max_processes=2),
            )

        assert any("e is judged" in note for note in run("latency.ratio<=9").notes)
        with pytest.raises(UsageError, match="no gate"):
            run(gate)

    def test_the_baselines_name_chooses_the_candidates_output(self):
        baseline = Outputs(self.SCORES, y=1)
        found = self.measure(baseline, Outputs(self.SCORES, e=-1, y=1), gated=True)
        assert (found.agreement[0].flips, found.notes) == (0, ())
        with pytest.raises(UsageError, match="b: 2 outputs"):
            self.measure(baseline, Outputs(self.SCORES, e=1, f=1), gated=True)
        assert self.measure(baseline, Outputs(self.SCORES, z=1), gated=True).notes == ()

    @pytest.mark.parametrize("labels", [None, np.arange(33) % 3])
    def test_a_batch_without_class_scores_is_not_counted(self, labels):
        pair = [Outputs(self.SCORES, squeezes=True, y=1), Outputs(self.SCORES, squeezes=True, y=1)]
        found = self.measure(*pair, labels=labels)
        assert {row.to_dict()["samples"] for row in (*found.rows, *found.agreement)} == {32}
        problem = r"a: output y for a batch of 1 is not of shape \(N, C\): 1 of 33 samples"
        assert re.match(problem, found.notes[0])
        with pytest.raises(DataError, match=problem):
            self.measure(*pair, labels=labels, gated=True)


def accuracy_bench(labels: Any, scores: list[NDArray[Any]], *gates: str, n: int = 2000) -> Any:
    runners = iter([Classifier(s) for s in scores])
    data = list(labelled(labels, n, 500))
    return run_bench(MODELS, data, gates=gates, latency=False, open_runner=lambda model: next(runners))


class TestAccuracyGates:
    LABELS = np.arange(2000) % 10
    PERFECT = np.eye(10)[LABELS]

    def wrong(self, count: int) -> NDArray[Any]:
        scores = self.PERFECT.copy()
        scores[:count] = np.roll(scores[:count], 1, axis=1)
        return scores

    @pytest.mark.parametrize(("lost", "verdict"), [(0, "pass"), (8, "inconclusive"), (200, "fail")])
    def test_drop_in_percentage_points(self, lost, verdict):
        found = accuracy_bench(self.LABELS, [self.PERFECT, self.wrong(lost)], "top1.drop<=0.5")
        assert found.verdict == verdict
        assert f"{lost} lost" in found.gates[0].detail

    def test_no_disagreement_on_few_samples_is_no_proof(self):
        found = accuracy_bench(self.LABELS, [self.PERFECT, self.PERFECT], "top1.drop<=0.5", n=50)
        assert found.verdict == "inconclusive"

    def test_flips_are_a_count(self):
        runs = [accuracy_bench(None, [self.PERFECT, self.wrong(3)], f"flips<={n}").verdict for n in (2, 3)]
        assert runs == ["fail", "pass"]

    def test_gates_are_reported_in_order_and_the_worst_decides(self):
        found = accuracy_bench(self.LABELS, [self.PERFECT, self.wrong(8)], "flips<=100", "top1.drop<=0.5", "flips<=2")
        assert [gate.verdict for gate in found.gates] == ["pass", "inconclusive", "fail"]
        assert found.verdict == "fail"

    @pytest.mark.parametrize(
        ("labels", "gate"), [(None, "top1.drop<=1"), (LABELS, "latency.ratio<=1"), (LABELS % 5, "top5.drop<=1")]
    )
    def test_a_gate_on_what_was_not_measured_never_passes(self, labels, gate):
        scores = self.PERFECT if labels is None else np.eye(5)[self.LABELS % 5]
        with pytest.raises(UsageError, match=gate.split("<")[0]):
            accuracy_bench(labels, [scores, scores], gate)

    def test_latency_only_refuses_accuracy_gates_before_it_starts(self):
        machine = FakeMachine(1, 1)
        with pytest.raises(UsageError, match="accuracy is off"):
            bench(machine, "flips<=0")
        assert machine.processes == 0

    def test_nothing_to_do(self):
        with pytest.raises(UsageError, match="at least one candidate"):
            run_bench(MODELS[:1], [BATCH])
        with pytest.raises(UsageError, match="nothing to measure"):
            run_bench(MODELS, [BATCH], accuracy=False, latency=False)
        with pytest.raises(DataError, match="no batch"):
            run_bench(MODELS, [])


def save_classifier(path: Path, scale: float = 1.0) -> BenchModel:
    weight = numpy_helper.from_array(np.eye(2, 3, dtype=np.float32) * scale, "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return BenchModel(str(path))


QUICK = LatencyOptions(processes=2, max_processes=2, block_ms=0.2, rounds=3, timeout_s=60)


@pytest.fixture
def workers(monkeypatch) -> None:
    """Worker processes find the package, installed or not."""
    monkeypatch.setenv("PYTHONPATH", SOURCES, prepend=":")


@pytest.mark.usefixtures("workers")
class TestRealWorkers:
    def test_end_to_end(self, tmp_path):
        models = [save_classifier(tmp_path / "a.onnx"), save_classifier(tmp_path / "b.onnx", 2.0)]
        x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
        data = [Batch(args=(x,), kwargs={}, labels=x.argmax(axis=1))]
        found = run_bench(models, data, gates=["flips<=0", "latency.ratio<=1000"], options=QUICK)
        assert [gate.verdict for gate in found.gates] == ["pass", "pass"]
        assert [row.runtime for row in found.latency] == ["onnxruntime", "onnxruntime (no optimisation)"]
        assert all(row.interval.processes == 2 and row.candidate_time.p50_ms > 0 for row in found.latency)
        json.dumps(found.to_dict(), allow_nan=False)

    def test_a_model_that_does_not_load_is_the_workers_own_error(self, tmp_path):
        (tmp_path / "bad.onnx").write_bytes(b"nonsense")
        models = [save_classifier(tmp_path / "a.onnx"), BenchModel(str(tmp_path / "bad.onnx"))]
        with pytest.raises(ModelError, match=r"bad\.onnx") as caught:
            run_bench(models, [BATCH], accuracy=False, options=QUICK)
        assert caught.value.exit_code == ExitCode.USAGE


def spec_in(folder: Path, **options: Any) -> WorkerSpec:
    return WorkerSpec(MODELS, str(folder / "inputs"), str(folder / "result"), LatencyOptions(**options), 0)


class TestCrashes:
    """Crashes are errors of the run, exit code 2 or 4: never a verdict, exit code 1."""

    @pytest.fixture
    def worker(self, tmp_path, monkeypatch) -> Callable[[str], None]:
        """Replaces the worker's program."""

        def use(program: str) -> None:
            script = tmp_path / "worker.py"
            script.write_text(f"import os, sys\nfrom pathlib import Path\n{program}\n")
            run = spawn.subprocess.run
            monkeypatch.setattr(spawn.subprocess, "run", lambda command, **rest: run([command[0], str(script)], **rest))

        return use

    def stage(self, tmp_path: Path) -> str:
        return f"Path({str(tmp_path / 'result.stage')!r}).write_text('candidate.onnx')"

    def test_a_dying_interpreter_names_the_model_and_shows_its_output(self, tmp_path, worker):
        worker(f"{self.stage(tmp_path)}; print('last words', flush=True); os.kill(os.getpid(), {signal.SIGKILL})")
        with pytest.raises(ModelError, match=r"(?s)signal 9 while it ran candidate\.onnx.*last words") as caught:
            run_worker(spec_in(tmp_path))
        assert caught.value.exit_code == ExitCode.USAGE

    def test_an_exception_names_the_model(self, tmp_path, worker):
        worker(f"{self.stage(tmp_path)}; 1 / 0")
        with pytest.raises(ModelError, match=r"(?s)exit status 1 while it ran candidate\.onnx.*ZeroDivisionError"):
            run_worker(spec_in(tmp_path))

    def test_leaving_without_a_result_is_a_crash_too(self, tmp_path, worker):
        worker(f"{self.stage(tmp_path)}; sys.exit(0)")
        with pytest.raises(ModelError, match="exit status 0"):
            run_worker(spec_in(tmp_path))

    def test_hanging(self, tmp_path, worker):
        worker(f"{self.stage(tmp_path)}; import time; time.sleep(60)")
        with pytest.raises(ModelError, match=r"did not finish within 0\.5 s while it ran candidate\.onnx"):
            run_worker(spec_in(tmp_path, timeout_s=0.5))

    def test_a_failure_before_any_model_is_ours(self, tmp_path, worker):
        worker("raise ImportError('no package')")
        with pytest.raises(BnctlError, match="before it came to any model") as caught:
            run_worker(spec_in(tmp_path))
        assert caught.value.exit_code == ExitCode.INTERNAL

    def test_what_models_print_does_not_reach_the_result(self, tmp_path, worker):
        good = FakeMachine(1, 1)(spec_in(tmp_path))
        worker(f"print('hello'); Path({str(tmp_path / 'result')!r}).write_text({good.to_json()!r})")
        assert run_worker(spec_in(tmp_path)) == good

    def test_specs_survive_the_way(self, tmp_path):
        spec = spec_in(tmp_path, threads=3)
        assert WorkerSpec.from_json(spec.to_json()) == spec
