"""A report for a person: Rich tables on a terminal. For scripts there is JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bnctl.codes import Code
    from bnctl.report import Report, Site

_STYLES = {
    "folded": "green", "foldable": "green", "inserted": "green", "recalibrated": "green", "left": "yellow", "finding": "red",
    "pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow",
}  # fmt: skip
MAX_ROWS = 40


def show(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Print a report."""
    for part in _parts(report, verbose=verbose):
        console.print(part)


def _parts(report: Report, *, verbose: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if report.sites:
        parts.append(_sites(report, verbose))
    if "places" in report.details:
        parts.append(_places(report.details["places"], verbose))
    if report.details.get("accuracy"):
        parts.append(_accuracy(report.details["accuracy"]))
    if report.details.get("latency"):
        parts.append(_latency(report.details["latency"]))
    if report.details.get("gates"):
        parts.append(_gates(report.details["gates"]))
    if report.verification is not None:
        parts.append(_verification(report.verification))
    parts.append(_summary(report))
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    return parts


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _sites(report: Report, verbose: bool) -> RenderableType:
    """The layers; where there are many, those that need a look."""
    sites = report.sites
    telling = [s for s in sites if s.code is not None]
    shown = sites if verbose or len(sites) <= MAX_ROWS else tuple(telling[:MAX_ROWS])
    drift = any("drift" in s.details for s in sites)
    table = _table(report.command, "layer", "", "drift" if drift else "into", "code", "why", right=("drift",))
    for site in shown:
        third = _drift(site) if drift else ", ".join(site.into)
        table.add_row(
            site.name, Text(site.action, style=_STYLES.get(site.action, "")), third, site.code or "", site.reason or ""
        )
    if len(shown) == len(sites):
        return table
    rest = Text(f"... {len(sites) - len(shown)} more: {_counts(sites)} (--verbose shows all)", style="dim")
    return Group(table, rest) if shown else rest


def _drift(site: Site) -> str:
    drift: Any = site.details.get("drift")
    if isinstance(drift, dict):
        drift = drift.get("max")
    return "" if drift is None else f"{drift:.3g}"


def _counts(sites: tuple[Site, ...]) -> str:
    counts = Counter(s.action if s.code is None else f"{s.action} {s.code}" for s in sites)
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())


def _places(places: list[dict[str, Any]], verbose: bool) -> RenderableType:
    shown = places if verbose or len(places) <= MAX_ROWS else [p for p in places if p["insertable"]][:MAX_ROWS]
    table = _table("places for a norm", "layer", "features", "insert", "why not", right=("features",))
    for place in shown:
        why = "" if place["insertable"] else f"{place['code']} {place['reason']}"
        table.add_row(place["name"], str(place["features"]), "yes" if place["insertable"] else "no", why)
    if len(shown) == len(places):
        return table
    counts = Counter("insertable" if p["insertable"] else p["code"] for p in places)
    rest = Text(
        "... " + ", ".join(f"{n} {what}" for what, n in counts.most_common()) + " (--verbose shows all)", style="dim"
    )
    return Group(table, rest) if shown else rest


def _accuracy(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "accuracy",
        "metric",
        "model",
        "baseline",
        "candidate",
        "difference",
        "95 % interval",
        "discordant",
        right=("baseline", "candidate", "difference"),
    )
    for row in rows:
        low, high = (100 * x for x in row["ci95"])
        table.add_row(
            row["metric"],
            str(row.get("model", row.get("candidate_model", ""))),
            f"{100 * row['baseline']:.2f} %",
            f"{100 * row['candidate']:.2f} %",
            f"{100 * row['difference']:+.2f} pp",
            f"[{low:+.2f}, {high:+.2f}]",
            str(row["discordant"]),
        )
    return table


def _latency(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "latency",
        "model",
        "runtime",
        "batch",
        "ratio",
        "95 % interval",
        "A/A noise",
        "p50 ms",
        "p99 ms",
        right=("batch", "ratio", "p50 ms", "p99 ms"),
    )
    for row in rows:
        low, high = row["ci95"]
        table.add_row(
            str(row.get("model", row.get("candidate", ""))),
            row["runtime"],
            str(row["batch"]),
            f"{row['ratio']:.3f}",
            f"[{low:.3f}, {high:.3f}]",
            f"{100 * row['noise_floor']:.1f} %",
            _pair(row["p50_ms"]),
            _pair(row["p99_ms"]),
        )
    return table


def _pair(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{v:.3f}" for v in value.values())
    return f"{value:.3f}"


def _gates(gates: list[dict[str, Any]]) -> Table:
    table = _table("gates", "gate", "verdict", "why")
    for gate in gates:
        table.add_row(gate["expression"], Text(gate["verdict"], style=_STYLES.get(gate["verdict"], "")), gate["detail"])
    return table


def _verification(v: Any) -> Text:
    word, style = ("equal", "green") if v["passed"] else ("DIFFERENT", "bold red")
    text = Text(word, style=style)
    if v["max_rel_error"] is not None:
        text.append(
            f" on {v['samples']} samples: largest error {v['max_abs_error']:.2g} absolute, {v['max_rel_error']:.2g} relative (tolerance {v['tolerance']:.2g})",
            style="",
        )
    if v.get("label_flips"):
        text.append(f", {v['label_flips']} labels flip")
    if v["passed"] and v.get("note"):
        text.append(f"\n{v['note']}", style="yellow")
    if not v["passed"]:
        text.append(f"\n{v['reason']}", style="red")
        if v.get("first_difference"):
            text.append(f"\nthe two part at {v['first_difference']['layer']}")
    return text


def _summary(report: Report) -> Text:
    words = " · ".join(f"{key} {value}" for key, value in report.summary.items() if not isinstance(value, (list, dict)))
    text = Text(f"{report.command}: ", style="bold")
    text.append(words, style=_STYLES.get(str(report.summary.get("verdict")), ""))
    text.append(f" · {report.elapsed_s:.1f} s", style="dim")
    if report.output is not None:
        text.append(f"\nwrote {report.output.path}", style="bold")
    return text


def show_code(code: Code, console: Console) -> None:
    """Print the page of a reason code."""
    body = Text()
    body.append(f"{code.why}\n\n")
    body.append("What to do: ", style="bold")
    body.append(code.remedy)
    console.print(Panel(body, title=f"{code.id}: {code.title}", title_align="left", width=min(console.width, 100)))
