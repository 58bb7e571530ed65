"""The page docs/zoo.md, from the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from zoo_tools import ONNX, TORCH

Row = dict[str, Any]
WRONG = 1e-3
NOISE = 10
"""A result is wrong beyond this relative error, and beyond so many times the error that float32 makes without any folding."""

HEAD = """# The zoo

What `bnctl fold` and its peers do on real architectures. This page is written by `python benchmarks/zoo.py --write docs/zoo.md` from measured results;
`benchmarks/zoo_choose.py` chooses the models by rule. Weights are random; scales are drawn from U(-0.3, 1.5), so that some are negative, and variances lie
around those of real activations.

- **BN** counts executed BatchNorm operators, by watching the calls of `torch.batch_norm` (frozen ones by hooks; in ONNX: nodes), before and after. No
  tool's own report is used.
- **error** is the largest over all outputs, relative to the output's root mean square, on inputs of another batch size and other values than the tool has
  seen: the folded model in float32 against a float64 copy of the original. Of detectors the backbone and the heads are compared. ONNX files are compared
  with themselves in float32, the runtime's optimisations off. **baseline** is the error that the original makes in float32 (ONNX: that a change of the
  inputs in the last place makes).
- A result is **wrong** where the error is above 1e-3 and above ten times the baseline. Where the baseline itself is above 1e-3, outputs are no evidence.
- A **crash** is an exception or the time limit; it folds nothing. bnctl **refuses** where its own verification fails: nothing would be written, and it
  counts as nothing folded.
- Peers are called as their manuals say: `torch.fx.experimental.optimization.fuse`, `aimet_torch.batch_norm_fold.fold_all_batch_norms`, onnxruntime's
  optimisations at the basic level, onnxscript's `optimize` and `rewrite`, onnxoptimizer's `fuse_bn_into_conv`, `onnxslim.slim`, `onnxsim.simplify`.
- Seconds are of one thread on a shared machine: orders of magnitude. A peer's are for the fold alone; bnctl's whole includes its verification.
"""


def page(folder: Path) -> str:
    """Markdown."""
    rows = {file.stem: _read(file) for file in sorted(folder.glob("*.jsonl"))}
    nets = {tool: {m: r for m, r in rows.get(tool, {}).items() if not m.endswith(".onnx")} for tool in TORCH}
    files = {tool: {m: r for m, r in rows.get(tool, {}).items() if m.endswith(".onnx")} for tool in ONNX}
    parts = [HEAD]
    for title, table in (("Torch models", nets), ("ONNX files", files)):
        parts += [f"## {title}", _summary(table), _evidence(table)]
    parts += ["## What bnctl leaves in torch models", _left(nets["bnctl"].values())]
    parts += [_left_by_model(nets["bnctl"].values())]
    parts += ["## Torch models, one by one", _each(nets), "## ONNX files, one by one", _each(files)]
    parts += ["## What ended without a result", _crashes(rows)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _read(file: Path) -> dict[str, Row]:
    """Rows by model; a later one replaces an earlier one."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {row["model"]: row for row in rows}


def folded(row: Row) -> int:
    """BatchNorm operators that are gone from what the tool would hand over."""
    return 0 if "crash" in row or "refused" in row else row["executed"] - row["remaining"]


def wrong(row: Row) -> bool:
    """Whether the result does not compute what the original does."""
    return "crash" not in row and "refused" not in row and row["error"] > max(WRONG, NOISE * row.get("baseline", 0.0))


def _executed(table: dict[str, dict[str, Row]]) -> dict[str, int]:
    """BatchNorms of every model, from whichever tool's run got as far as counting."""
    return {m: r["executed"] for rows in table.values() for m, r in rows.items() if "executed" in r}


def _summary(table: dict[str, dict[str, Row]]) -> str:
    executed = _executed(table)
    lines = [
        "| tool | models | BN | folded | wrong | refused | crashes | median seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for tool, rows in table.items():
        if not rows:
            lines.append(f"| {tool} | not measured | | | | | | |")
            continue
        total = sum(executed.get(m, 0) for m in rows)
        gone = sum(folded(r) for r in rows.values() if not wrong(r))
        seconds = [r["seconds"]["whole"] for r in rows.values() if "whole" in r.get("seconds", {})]
        share = f"{gone} ({100 * gone / total:.1f} %)" if total else "0"
        counts = [
            sum(map(wrong, rows.values())),
            *(sum(key in r for r in rows.values()) for key in ("refused", "crash")),
        ]
        version = next((r["version"] for r in rows.values() if "version" in r), "")
        shown = " | ".join(map(str, counts))
        lines.append(
            f"| {tool} {version} | {len(rows)} | {total} | {share} | {shown} | {median(seconds) if seconds else 0:.2f} |"
        )
    return "\n".join(lines)


def _evidence(table: dict[str, dict[str, Row]]) -> str:
    """How much the outputs prove: of bnctl's rows."""
    rows = [r for r in table["bnctl"].values() if "fault" in r and "error" in r]
    if not rows:
        return ""
    noisy = [r["model"] for r in rows if r["baseline"] > WRONG]
    blind = [r["model"] for r in rows if r["fault"] <= WRONG]
    differs = [r["model"] for r in rows if (r["remaining"] > 0) != bool(r["codes"])]
    seconds = {key: [r["seconds"][key] for r in rows if key in r["seconds"]] for key in ("capture", "fold", "whole")}
    shown = ", ".join(f"{key} {median(v):.2f} ({max(v):.1f})" for key, v in seconds.items() if v)
    largest = max((r["error"] for r in rows if r["baseline"] <= WRONG), default=0.0)
    return "\n".join(
        [
            f"- Seconds of bnctl, median (and largest), one thread, batch 2: {shown}. Capture is part of fold, fold of whole, which verifies.",
            f"- Largest error of bnctl where the baseline is at most 1e-3: {largest:.1e}. Baseline above that: {len(noisy)} models{_named(noisy)}.",
            f"- Negative control: a fault of 10 % in half the channels of the first BatchNorm shows as an error above 1e-3 in {len(rows) - len(blind)} of "
            f"{len(rows)} models; blind: {len(blind)}{_named(blind)}.",
            f"- bnctl's report and the independent count disagree on whether anything is left in {len(differs)} models{_named(differs)}.",
        ]
    )


def _named(models: list[str]) -> str:
    return f" ({', '.join(models)})" if models else ""


def _left(rows: Iterable[Row]) -> str:
    sites = [(code, row["model"]) for row in rows for _, code, _ in row.get("left", ())]
    if not sites:
        return "Nothing."
    number, models = Counter(c for c, _ in sites), {c: {m for d, m in sites if d == c} for c, _ in sites}
    lines = ["| code | layers | share of what is left | models |", "|---|--:|--:|--:|"]
    lines += [f"| {c} | {n} | {100 * n / len(sites):.1f} % | {len(models[c])} |" for c, n in number.most_common()]
    return "\n".join(lines)


def _left_by_model(rows: Iterable[Row]) -> str:
    lines = ["| model | left by code | the first, and why |", "|---|---|---|"]
    for row in sorted((r for r in rows if r.get("left")), key=lambda r: -len(r["left"])):
        codes = ", ".join(f"{c} {n}" for c, n in sorted(row["codes"].items()))
        name, _, reason = row["left"][0]
        lines.append(f"| {row['model']} | {codes} | `{name}`: {reason} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _each(table: dict[str, dict[str, Row]]) -> str:
    executed = _executed(table)
    tools = [tool for tool, rows in table.items() if rows]
    lines = [
        f"| model | BN | {' | '.join(tools)} | bnctl's error | baseline | capture s | fold s | whole s |",
        "|---|--:|" + "--:|" * (len(tools) + 5),
    ]
    for model in sorted({m for rows in table.values() for m in rows}):
        ours = table["bnctl"].get(model, {})
        cells = [_cell(table[tool].get(model)) for tool in tools]
        errors = [f"{ours[key]:.1e}" if key in ours else "" for key in ("error", "baseline")]
        times = [
            f"{ours['seconds'][k]:.2f}" if k in ours.get("seconds", {}) else "" for k in ("capture", "fold", "whole")
        ]
        lines.append(f"| {Path(model).name} | {executed.get(model, '')} | {' | '.join([*cells, *errors, *times])} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    for word in ("crash", "refused"):
        if word in row:
            return word
    return f"{folded(row)} wrong ({row['error']:.0e})" if wrong(row) else str(folded(row))


def _crashes(rows: dict[str, dict[str, Row]]) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for tool, models in rows.items():
        for model, row in models.items():
            if why := row.get("crash") or row.get("refused"):
                first = why.strip().splitlines()[0].replace("|", "/")[:200]
                found.setdefault((tool, first), []).append(Path(model).name)
    lines = [f"- {tool}: {', '.join(models)}: `{why}`" for (tool, why), models in found.items()]
    return "\n".join(lines) or "Nothing."
