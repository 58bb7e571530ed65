"""The page docs/recalibration-peers.md, from the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from recalibration_models import CASES

Row = dict[str, Any]

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
process, in random order. *Plain again* is a second plain pass: its difference from 1 is noise. Peers measure nothing of what they have done; bnctl's figures
include what it reports of drift and self-consistency.
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
    runs = {job: row for job, row in latest.items() if job[0] == "run"}
    repeats = {len(values) for row in runs.values() for values in row["seconds"].values()}
    parts = [
        HEAD.format(versions=traps["versions"]),
        TRAPS,
        _table(["", *methods], ([name, *checked.values()] for name, checked in traps["traps"].items())),
        ERRORS,
        _table(["network", "batch", "float32", "before", *methods], _errors(latest, runs, methods)),
        COST.format(repeats=" or ".join(map(str, sorted(repeats)))),
        _table(["network", "batch", "threads", "images/s", "plain again", *methods], _costs(runs, methods)),
        MEMORY,
        _table(["network", *methods], _memory(latest, methods)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _errors(
    latest: dict[tuple[str, ...], Row], runs: dict[tuple[str, ...], Row], methods: list[str]
) -> Iterable[list[str]]:
    for case in CASES:
        floor = latest.get(("float32", case.name), {}).get("error")
        for (_, name, size, threads, _), row in runs.items():
            if name == case.name and threads == "1":
                found = (floor, *(row["errors"].get(method) for method in ["before", *methods]))
                yield [case.name, size, *("" if pair is None else " / ".join(map(_short, pair)) for pair in found)]


def _costs(runs: dict[tuple[str, ...], Row], methods: list[str]) -> Iterable[list[str]]:
    for case in CASES:
        for (_, name, size, threads, _), row in runs.items():
            if name == case.name:
                clock = 1 if threads == "1" else 0
                seconds = {run: [pair[clock] for pair in pairs] for run, pairs in row["seconds"].items()}
                rate = case.images / median(seconds["plain"])
                found = (_ratio(seconds.get(method), seconds["plain"]) for method in ["plain again", *methods])
                yield [case.name, size, threads, f"{rate:.0f}", *found]


def _ratio(seconds: list[float] | None, plain: list[float]) -> str:
    return "" if seconds is None else f"{median(s / p for s, p in zip(seconds, plain, strict=True)):.2f}"


def _memory(latest: dict[tuple[str, ...], Row], methods: list[str]) -> Iterable[list[str]]:
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
