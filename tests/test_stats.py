"""Intervals and tests: against published examples, independent formulas, and by simulation."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from bnctl.stats.paired import mcnemar_exact, paired_difference
from bnctl.stats.ratio import geometric_mean, processes_needed, ratio_interval
from bnctl.stats.verdict import judge, worst


class TestRatio:
    def test_interval_is_students(self):
        logs = [0.01, 0.03, -0.02, 0.05, 0.0]
        expected = scipy_stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
        found = ratio_interval(logs)
        assert math.log(found.low) == pytest.approx(expected.low)
        assert math.log(found.high) == pytest.approx(expected.high)
        assert found.ratio == pytest.approx(geometric_mean([math.exp(x) for x in logs]))
        assert found.half_width == pytest.approx((expected.high - expected.low) / 2)
        assert found.processes == 5

    def test_one_process_says_nothing(self):
        with pytest.raises(ValueError, match="at least two"):
            ratio_interval([0.1])

    def test_geometric_mean_treats_inverses_alike(self):
        assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)

    @given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
    def test_swapping_the_models_inverts_the_interval(self, logs):
        forward, backward = ratio_interval(logs), ratio_interval([-x for x in logs])
        assert forward.low == pytest.approx(1 / backward.high)
        assert forward.ratio == pytest.approx(1 / backward.ratio)

    @pytest.mark.parametrize("n", [3, 5, 8])
    def test_coverage_with_few_processes(self, n):
        rng = np.random.default_rng(n)
        intervals = [ratio_interval(list(x)) for x in rng.normal(0.02, 0.01, (1500, n))]
        coverage = np.mean([i.low <= math.exp(0.02) <= i.high for i in intervals])
        assert 0.935 <= coverage <= 0.965

    def test_negative_control_bootstrap_undercovers(self):
        rng = np.random.default_rng(0)
        samples = rng.normal(size=(600, 5))
        picks = rng.integers(0, 5, (600, 5))
        covered = 0
        for x in samples:
            low, high = np.quantile(x[picks].mean(axis=1), [0.025, 0.975])
            covered += low <= 0 <= high
        assert covered / 600 < 0.9

    @given(st.lists(st.floats(-1, 1), min_size=3, max_size=8), st.floats(0.05, 1))
    def test_processes_needed_is_the_smallest_number(self, logs, half_width):
        n = processes_needed(logs, half_width)

        def half(count: int) -> float:
            return scipy_stats.t.ppf(0.975, count - 1) * stdev(logs) / math.sqrt(count)

        assert half(n) <= half_width * (1 + 1e-9)
        assert n == 2 or half(n - 1) > half_width * (1 - 1e-9)

    def test_processes_needed_refuses_no_width(self):
        with pytest.raises(ValueError, match="positive"):
            processes_needed([0.0, 0.1], 0.0)


class TestPaired:
    # Fagerland, Lydersen & Laake, "Recommended tests and confidence intervals for paired binomial proportions",
    # Statistics in Medicine 33, 2014: Tango's interval for Bentur et al. 2009 (n = 21) and Cavo et al. 2012 (n =
    # 161).
    @pytest.mark.parametrize(
        ("counts", "interval", "p_value"),
        [((7, 1, 21), (-0.517, -0.026), 0.0703), ((16, 6, 161), (-0.124, -0.005), 0.0525)],
    )
    def test_published_examples(self, counts, interval, p_value):
        found = paired_difference(*counts)
        assert (found.low, found.high) == pytest.approx(interval, abs=5e-4)
        assert found.p_value == pytest.approx(p_value, abs=5e-5)

    def test_limits_are_where_the_score_test_starts_to_reject(self):
        lost, gained, n = 20, 40, 160
        found = paired_difference(lost, gained, n)
        for d in (found.low, found.high):
            # The constrained maximum of the likelihood, searched instead of solved.
            q = np.linspace(1e-6, 1, 400_001)
            feasible = (q + d > 0) & (2 * q + d < 1)
            q = q[feasible]
            likelihood = gained * np.log(q + d) + lost * np.log(q) + (n - lost - gained) * np.log(1 - 2 * q - d)
            best = q[likelihood.argmax()]
            z = (gained - lost - n * d) / math.sqrt(n * (2 * best + d * (1 - d)))
            assert abs(z) == pytest.approx(1.959964, abs=1e-4)

    @pytest.mark.parametrize("n", [1, 10, 1000])
    def test_no_disagreement_is_no_proof(self, n):
        found = paired_difference(0, 0, n)
        z2 = 1.959964**2
        assert (found.low, found.high) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))
        assert found.p_value == 1.0

    @given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 200))
    def test_properties(self, lost, gained, concordant):
        n = lost + gained + concordant
        if n == 0:
            return
        found, mirrored = paired_difference(lost, gained, n), paired_difference(gained, lost, n)
        assert -1 <= found.low <= found.difference <= found.high <= 1
        assert found.low < found.high
        assert found.low == pytest.approx(-mirrored.high, abs=1e-9)

    @pytest.mark.parametrize(
        ("n", "lose", "gain"), [(50, 0.02, 0.02), (200, 0.01, 0.01), (200, 0.005, 0.02), (500, 0.05, 0.03)]
    )
    def test_coverage(self, n, lose, gain):
        rng = np.random.default_rng(7)
        counts = rng.multinomial(n, [lose, gain, 1 - lose - gain], 3000)
        distinct, repeats = np.unique(counts, axis=0, return_counts=True)
        found = [paired_difference(int(lost), int(gained), n) for lost, gained, _ in distinct]
        covered = np.array([f.low <= gain - lose <= f.high for f in found])
        assert (covered * repeats).sum() / repeats.sum() >= 0.935

    def test_negative_control_wald_undercovers(self):
        rng = np.random.default_rng(7)
        counts = rng.multinomial(50, [0.02, 0.02, 0.96], 3000)
        lost, gained = counts[:, 0], counts[:, 1]
        half = 1.96 * np.sqrt((lost + gained) / 50 - ((gained - lost) / 50) ** 2) / math.sqrt(50)
        assert np.mean(np.abs((gained - lost) / 50) <= half - 1e-12) < 0.9

    @given(st.integers(0, 40), st.integers(0, 40))
    def test_mcnemar_is_the_binomial_test(self, lost, gained):
        expected = scipy_stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
        assert mcnemar_exact(lost, gained) == pytest.approx(expected)

    @pytest.mark.parametrize("counts", [(0, 0, 0), (3, 3, 5), (-1, 0, 5)])
    def test_impossible_counts(self, counts):
        with pytest.raises(ValueError, match="impossible"):
            paired_difference(*counts)


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (0.9, 1.0, "pass"),
            (0.9, 1.05, "pass"),
            (1.0, 1.1, "inconclusive"),
            (1.05, 1.1, "inconclusive"),
            (1.06, 1.1, "fail"),
        ],
    )
    def test_judge(self, low, high, verdict):
        assert judge(low, high, 1.05) == verdict

    def test_worst(self):
        ladder = ["pass", "inconclusive", "fail"]
        assert worst([]) == "pass"
        for better, worse in pairwise(ladder):
            assert worst([better, worse, better]) == worse


def test_neither_torch_nor_onnxruntime_is_imported():
    code = (
        "import sys, bnctl.stats.paired, bnctl.stats.ratio; print({'torch', 'onnxruntime', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
