"""The page docs/recalibration-peers.md, from the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from recalibration_models import CASES, Case
from recalibration_models import PHOTOGRAPHS as photographs

Row = dict[str, Any]
Rows = dict[tuple[str, ...], Row]

HEAD = """# Recalibration, side by side

`bnctl recalibrate` and its peers on the same models, images and machine. This page is written by `python benchmarks/recalibration.py` from measured
results: `{versions}`, two shared cores, no GPU.

Called as their manuals say: `fvcore.nn.precise_bn.update_bn_stats` with the BatchNorms in train mode and nothing else, `torch.optim.swa_utils.update_bn`
under `no_grad`, `aimet_torch.bn_reestimation.reestimate_bn_stats`, all with as many batches as there are.

Networks: ResNet-20 with its trained weights on 1,000 CIFAR-10 images; the others with random weights (scales from U(-0.3, 1.5)) on 128 images of 96 x 96
(LeViT: 224 x 224) with the spectrum of photographs and a contrast and a brightness of their own.
"""

TRAPS = """## What goes wrong

Networks of one or two layers whose right answer is known; right is an error below 0.01, in standard deviations of the channel for means and as a ratio for
variances. `ema` is what training does: its last batches weigh most, by definition.
"""

ERRORS = """## Error

The truth is what inference sees: the statistics of each layer's input when all layers before it have theirs already, computed naively in float64
(`benchmarks/recalibration_truth.py`, which uses nothing of bnctl). Each cell has the largest error over all layers and channels, of means,
`|mean - mean'| / sqrt(var' + eps)`, and of variances, `|var - var'| / (var' + eps)`; primes for the truth. All batches are full here. *float32* is the same
naive procedure with the network in float32: what no method that runs it in float32 can be expected to be below. *before*: the statistics that the network came
with. What is not `exact` follows another definition, in which every layer normalises with its own batch: its error says by how much these statistics miss what
inference sees. `ema` starts from the statistics of before.
"""

COST = """## Cost

The whole call as a multiple of a plain forward pass over the same batches. With one thread it is processor time, which other work on the machine changes
little; with two threads it is wall time, measured on an idle machine only. Median over {repeats} repeats; all methods and the plain pass take turns in one
process, in random order, after each was run once. *Plain again* is a second plain pass: its difference from 1 is noise. Peers measure nothing of what they
have done; bnctl's figures include what it reports of drift and self-consistency: `batch` and `ema` run one batch in 32 once more, of these few batches one
of 4 or of 16.
"""

PHOTOGRAPHS = """### As in earnest

128 images of 224 x 224 in batches of 32, one thread. An activation has up to 150 MB here. glibc gives blocks of that size back to the system when they are
freed, and the system clears every page of the next one, for everybody alike. The command `bnctl recalibrate` has glibc keep freed memory
([decision 0015](decisions/0015-freed-memory-is-kept.md)); the function `bnctl.recalibrate` leaves the process as it is. *given back*: all methods as in a
script of one's own, by default. *kept*: all methods as the command runs. What the script loses is in the images/s of the plain passes. ResNet-50 was measured
in one way only.
"""

SMALL = """### Small images, small batches

Where little is computed per layer, the way to it costs: Python sees every operator, and each BatchNorm is a stop. Rows with a * were measured before decision
0015, which made `exact` somewhat faster here.
"""

MEMORY = """## Peak memory

Resident memory of a fresh process, MB above the peak of a plain forward pass over the same data. `exact` holds the paused forward passes
of all batches (at most half of what is free, by default).
"""


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    latest = {tuple(row["job"]): row for row in rows}
    traps = latest["traps",]
    methods = list(next(iter(traps["traps"].values())))
    costs = {job: row for job, row in latest.items() if job[0] == "cost"}
    repeats = sorted({len(values) for row in costs.values() for values in row["seconds"].values()})
    parts = [
        HEAD.format(versions=traps["versions"]),
        TRAPS,
        _table(["", *methods], ([name, *checked.values()] for name, checked in traps["traps"].items())),
        ERRORS,
        _table(["network", "batch", "float32", "before", *methods], _errors(latest, methods)),
        COST.format(repeats=" or ".join(map(str, repeats))),
        PHOTOGRAPHS,
        _table(["network", "freed memory", "images/s", "plain again", *methods], _of_photographs(costs, methods)),
        SMALL,
        _table(["network", "batch", "threads", "images/s", "plain again", *methods], _of_small(costs, methods)),
        MEMORY,
        _table(["network", *methods], _memory(latest, methods)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _errors(latest: Rows, methods: list[str]) -> Iterable[list[str]]:
    for case in CASES:
        floor = latest.get(("float32", case.name), {}).get("error")
        for job, row in latest.items():
            if job[:2] == ("error", case.name):
                found = (floor, *(row["errors"].get(method) for method in ["before", *methods]))
                yield [case.name, job[2], *("" if pair is None else " / ".join(map(_short, pair)) for pair in found)]


def _of_photographs(costs: Rows, methods: list[str]) -> Iterable[list[str]]:
    for case in photographs:
        for (_, name, _, _, freed), row in costs.items():
            if name == case.name:
                yield [name.partition(",")[0], freed, *_cost(case, row, 1, methods)]


def _of_small(costs: Rows, methods: list[str]) -> Iterable[list[str]]:
    for case in CASES:
        for (_, name, size, threads, _), row in costs.items():
            if name == case.name:
                yield [
                    name + " *" * row.get("earlier", False),
                    size,
                    threads,
                    *_cost(case, row, 1 if threads == "1" else 0, methods),
                ]


def _cost(case: Case, row: Row, clock: int, methods: list[str]) -> Iterable[str]:
    seconds = {run: [pair[clock] for pair in pairs] for run, pairs in row["seconds"].items()}
    plain = seconds["plain"]
    return f"{case.images / median(plain):.0f}", *(_ratio(seconds.get(m), plain) for m in ["plain again", *methods])


def _ratio(seconds: list[float] | None, plain: list[float]) -> str:
    return "" if seconds is None else f"{median(s / p for s, p in zip(seconds, plain, strict=True)):.2f}"


def _memory(latest: Rows, methods: list[str]) -> Iterable[list[str]]:
    for case in CASES:
        peaks = {job[3]: row["peak_bytes"] for job, row in latest.items() if job[:2] == ("memory", case.name)}
        if peaks:
            above = (peaks.get(method) for method in methods)
            yield [case.name, *("" if p is None else f"{(p['method'] - p['plain']) / 1e6:.0f}" for p in above)]


def _short(value: float) -> str:
    return f"{value:.0e}" if value < 1e-3 else f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    line = "|".join(["---", *["--:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in rows)])
