"""Gates: limits on what a bench measured, and one of three verdicts on each.

::

    gate   = metric "<=" number
    metric = "latency.ratio"        candidate over baseline, 1.05 is 5 % slower
           | "top1.drop"            accuracy lost, in percentage points: baseline minus candidate
           | "top5.drop"
           | "flips"                samples whose top class changed

A gate holds for every candidate: its verdict is that of the worst. Latency is judged where the runtime optimises as
it does for users. A gate on something that was not measured is an error of the call: it must not pass for lack of
data.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bnctl.bench.accuracy import AccuracyRow, AgreementRow
from bnctl.bench.latency import LatencyRow
from bnctl.errors import ExitCode, UsageError
from bnctl.stats.verdict import Verdict, judge, worst

METRICS = ("latency.ratio", "top1.drop", "top5.drop", "flips")

_GATE = re.compile(r"\s*(?P<metric>[^\s<>=!]*)\s*(?P<operator>[<>=!]*)\s*(?P<limit>\S*)\s*(?P<rest>.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_EXIT_CODES = {"pass": ExitCode.OK, "fail": ExitCode.FAILED, "inconclusive": ExitCode.INCONCLUSIVE}


@dataclass(frozen=True)
class Gate:
    """``metric <= limit``.

    Attributes:
        expression: as the user wrote it.
        metric: one of :data:`METRICS`.
        limit: in the metric's unit.
    """

    expression: str
    metric: str
    limit: float


@dataclass(frozen=True)
class GateResult:
    """A gate's outcome; ``detail`` is the sentence that justifies it."""

    expression: str
    verdict: Verdict
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """One entry of the report's ``gates``."""
        return {"expression": self.expression, "verdict": self.verdict, "detail": self.detail}


def parse_gate(expression: str) -> Gate:
    """Parse one ``--gate``.

    Raises:
        UsageError: not of the grammar above; says at which column, and which metrics there are.
    """
    found = _GATE.fullmatch(expression)
    assert found is not None  # every part may be empty

    def wrong(part: str, problem: str) -> UsageError:
        column = found.start(part)
        return UsageError(
            f"gate, column {column + 1}: {problem}\n  {expression}\n  {' ' * column}^",
            hint=f"a gate is METRIC<=NUMBER; the metrics are {', '.join(METRICS)}",
        )

    metric = found["metric"]
    if metric not in METRICS:
        close = difflib.get_close_matches(metric, METRICS, n=1)
        raise wrong("metric", f"no metric {metric!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if found["operator"] != "<=":
        raise wrong("operator", f"expected '<=', found {_quoted(found['operator'] or found['limit'])}")
    if not _NUMBER.fullmatch(found["limit"]) or not math.isfinite(float(found["limit"])):
        raise wrong("limit", f"expected a number, found {_quoted(found['limit'])}")
    if found["rest"]:
        raise wrong("rest", f"nothing may follow the number, found {found['rest']!r}")
    limit = float(found["limit"])
    if metric == "latency.ratio" and limit <= 0:
        raise wrong("limit", "a ratio of run times is positive; 1.05 means at most 5 % slower")
    if metric == "flips" and limit < 0:
        raise wrong("limit", "a count is not negative")
    return Gate(expression.strip(), metric, limit)


def latency_limit(gates: Sequence[Gate]) -> float | None:
    """The strictest limit on the latency ratio, if there is one."""
    return min((gate.limit for gate in gates if gate.metric == "latency.ratio"), default=None)


def evaluate(
    gate: Gate,
    latency: Sequence[LatencyRow],
    accuracy: Sequence[AccuracyRow],
    agreement: Sequence[AgreementRow],
) -> GateResult:
    """The verdict on one gate, over all candidates.

    Raises:
        UsageError: what the gate limits was not measured.
    """
    judged: list[tuple[Verdict, str]]
    if gate.metric == "latency.ratio":
        judged = [(row.verdict(gate.limit), _latency_detail(row)) for row in latency if row.optimised]
    elif gate.metric == "flips":
        # A count over the given samples, not an estimate: there is nothing to be unsure about.
        judged = [(judge(a.flips, a.flips, gate.limit), f"{a.candidate}: {a.flips} of {a.samples}") for a in agreement]
    else:
        rows = [row for row in accuracy if f"{row.metric}.drop" == gate.metric]
        judged = [(_drop_verdict(row, gate.limit), _drop_detail(row, gate.limit)) for row in rows]
    if not judged:
        raise UsageError(
            f"gate {gate.expression!r}: {gate.metric} was not measured",
            hint="top1 and top5 need labels (top5 more than five classes, too), flips need class scores",
        )
    verdict = worst([verdict for verdict, _ in judged])
    return GateResult(gate.expression, verdict, "; ".join(detail for one, detail in judged if one == verdict))


def exit_code(verdict: Verdict) -> ExitCode:
    """0 for pass, 1 for fail, 3 for inconclusive."""
    return _EXIT_CODES[verdict]


def _quoted(part: str) -> str:
    return repr(part) if part else "the end"


def _drop_verdict(row: AccuracyRow, limit_pp: float) -> Verdict:
    return judge(-100 * row.paired.high, -100 * row.paired.low, limit_pp)


def _drop_detail(row: AccuracyRow, limit_pp: float) -> str:
    drop, low, high = (-100 * value for value in (row.paired.difference, row.paired.high, row.paired.low))
    more = ""
    if low <= limit_pp < high:
        room = limit_pp - drop
        # The width falls with the root of the number of samples; where none disagree, with the number.
        falls = 2 if row.paired.lost + row.paired.gained else 1
        samples = math.ceil(row.paired.samples * ((high - drop) / room) ** falls) if room > 0 else 0
        more = f": it takes about {samples:,} samples" if samples else ": more samples will hardly help"
    return (
        f"{row.candidate}: {row.metric} drop {drop:z.2f} points, 95 % interval [{low:z.2f}, {high:z.2f}], "
        f"{row.paired.lost} lost and {row.paired.gained} gained of {row.paired.samples}{more}"
    )


def _latency_detail(row: LatencyRow) -> str:
    again = row.confirmation
    return (
        f"{row.candidate} ({row.runtime}): ratio {row.interval.ratio:.4f}, "
        f"95 % interval [{row.interval.low:.4f}, {row.interval.high:.4f}] over {row.interval.processes} processes, "
        f"noise floor {row.noise_floor:.2%}"
        + (f"; fresh processes alone: [{again.low:.4f}, {again.high:.4f}]" if again else "")
    )
