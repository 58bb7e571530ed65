"""A report as tables of words, the same for a terminal and for Markdown: which rows, which columns, which units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnctl.report import Report, Site

MAX_ROWS = 40
"""Longer tables show what needs a look, and count the rest."""

MAX_REASON = 120
"""Letters of a reason in a table."""


@dataclass(frozen=True)
class Column:
    """One column: its heading, its cells, and how they are set.

    Args:
        heading: with the unit, where there is one.
        cells: one per row.
        right: aligned to the right, for numbers.
        status: cells are verdicts or actions, which have colours.
        wraps: long cells may go on in a further line; figures may not.
    """

    heading: str
    cells: Sequence[str]
    right: bool = False
    status: bool = False
    wraps: bool = False


@dataclass(frozen=True)
class Table:
    """Columns that all have something to say.

    Args:
        title: what is shown.
        columns: those that hold anything.
        rest: what was left out for its length.
    """

    title: str
    columns: tuple[Column, ...]
    rest: str = ""


def tables(report: Report, *, verbose: bool = False) -> list[Table]:
    """All that a report has to show in rows."""
    details = report.details
    found = []
    if report.sites:
        found.append(_sites(report, verbose))
    if details.get("places"):
        found.append(_places(details["places"], verbose))
    if details.get("accuracy"):
        found.append(_accuracy(details["accuracy"], report.source))
    if details.get("latency"):
        found.append(_latency(details["latency"]))
    if details.get("gates"):
        found.append(_gates(details["gates"]))
    return found


def samples(verification: Mapping[str, Any]) -> str:
    """How many samples a verification rests on."""
    varied = verification.get("varied_samples")
    return f"{verification['samples']} samples" + (f" and {varied} varied ones" if varied else "")


def _table(title: str, *columns: Column, rest: str = "") -> Table:
    return Table(title, tuple(c for c in columns if any(c.cells)), rest)


def _sites(report: Report, verbose: bool) -> Table:
    """The layers; where there are many, those that were left with a reason, and those that changed most."""
    sites = report.sites
    shown: Sequence[Site] = sites
    if not verbose and len(sites) > MAX_ROWS:
        telling = [s for s in sites if s.code is not None or _drift(s) is not None]
        shown = sorted(telling, key=lambda s: (s.code is None, -(_drift(s) or 0.0)))[:MAX_ROWS]
    counts = Counter(s.action if s.code is None else f"{s.action} {s.code}" for s in sites)
    return _table(
        "layers",
        Column("layer", [s.name for s in shown], wraps=True),
        # Of a layer that folds, "into" says it already.
        Column("fed by", ["" if s.into else s.details.get("fed_by") or "" for s in shown], wraps=True),
        Column("channels", [str(s.details.get("channels") or "") for s in shown], right=True),
        Column("scale", [_scale(s) for s in shown]),
        Column("", [s.action for s in shown], status=True),
        Column("into", [", ".join(s.into) for s in shown], wraps=True),
        Column("drift, nats", [_figure(_drift(s)) for s in shown], right=True),
        Column("self-consistency", [_figure(s.details.get("self_consistency")) for s in shown], right=True),
        Column("± mean, sd", [_figure(s.details.get("standard_error")) for s in shown], right=True),
        Column("code", [s.code or "" for s in shown]),
        Column("why", [_why(s, verbose) for s in shown], wraps=True),
        rest=_rest(len(sites) - len(shown), counts),
    )


def _why(site: Site, verbose: bool) -> str:
    """The reason, cut where it would fill the screen; JSON and `--verbose` have the whole."""
    reason = site.reason or ""
    return reason if verbose or len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} ..."


def _drift(site: Site) -> float | None:
    """The largest of any channel."""
    drift: Any = site.details.get("drift")
    return None if drift is None else drift["max"]


def _scale(site: Site) -> str:
    low, high = site.details.get("scale_min"), site.details.get("scale_max")
    return "" if low is None or high is None else " to ".join(dict.fromkeys((f"{low:.3g}", f"{high:.3g}")))


def _places(places: Sequence[dict[str, Any]], verbose: bool) -> Table:
    shown = places
    if not verbose and len(places) > MAX_ROWS:
        shown = [p for p in places if p["insertable"]][:MAX_ROWS]
    counts = Counter("insertable" if p["insertable"] else f"not, {p['code']}" for p in places)
    return _table(
        "places for a norm",
        Column("layer", [p["name"] for p in shown], wraps=True),
        Column("features", [str(p["features"] or "") for p in shown], right=True),
        Column("", ["insertable" if p["insertable"] else "no" for p in shown], status=True),
        Column("code", [p["code"] or "" for p in shown]),
        Column("why", [p["reason"] or "" for p in shown], wraps=True),
        rest=_rest(len(places) - len(shown), counts),
    )


def _rest(hidden: int, counts: Counter[str]) -> str:
    if not hidden:
        return ""
    return f"{hidden} more; in all {', '.join(f'{n} {what}' for what, n in counts.most_common())} (--verbose shows all)"


def _accuracy(rows: Sequence[dict[str, Any]], baseline: Any) -> Table:
    names = short_names([*(() if baseline is None else (baseline.path,)), *(r["model"] for r in rows)])
    return _table(
        _against("accuracy", None if baseline is None else names[baseline.path], [names[r["model"]] for r in rows]),
        _candidates([names[r["model"]] for r in rows]),
        Column("metric", [r["metric"] for r in rows]),
        Column("baseline", [f"{100 * r['baseline']:.2f} %" for r in rows], right=True),
        Column("candidate", [f"{100 * r['candidate']:.2f} %" for r in rows], right=True),
        Column("difference", [f"{100 * r['difference']:+z.2f} pp" for r in rows], right=True),
        Column("95 % interval", [_interval(r["ci95"], "+z.2f", 100) for r in rows]),
        Column("disagree", [f"{r['discordant']} of {r['samples']}" for r in rows], right=True),
    )


def _latency(rows: Sequence[dict[str, Any]]) -> Table:
    names = short_names([rows[0]["baseline"], *(r["candidate"] for r in rows)])
    candidates = [names[r["candidate"]] for r in rows]
    title = _against(
        f"latency, batch {rows[0]['batch']}, threads {rows[0]['threads']}", names[rows[0]["baseline"]], candidates
    )
    return _table(
        title,
        _candidates(candidates),
        Column("runtime", [r["runtime"] for r in rows], wraps=True),
        Column("ratio", [f"{r['ratio']:.3f}" for r in rows], right=True),
        Column("95 % interval", [_interval(r["ci95"], ".3f") for r in rows]),
        Column("A/A noise", [f"{100 * r['noise_floor']:.1f} %" for r in rows], right=True),
        Column("p50, ms", [_before_after(r["p50_ms"]) for r in rows], right=True),
        Column("p99, ms", [_before_after(r["p99_ms"]) for r in rows], right=True),
    )


def _against(title: str, baseline: str | None, candidates: Sequence[str]) -> str:
    """One candidate is named in the title, not in every row."""
    one = f"{candidates[0]} against " if len(set(candidates)) == 1 else "against "
    return title if baseline is None else f"{title}: {one}{baseline}"


def _candidates(names: Sequence[str]) -> Column:
    return Column("candidate", names if len(set(names)) > 1 else [""] * len(names), wraps=True)


def _before_after(times: dict[str, float | None]) -> str:
    return " / ".join("-" if t is None else f"{t:.3g}" for t in times.values())


def _gates(gates: Sequence[dict[str, Any]]) -> Table:
    return _table(
        "gates",
        Column("gate", [g["expression"] for g in gates]),
        Column("verdict", [g["verdict"] for g in gates], status=True),
        Column("why", [g["detail"] for g in gates], wraps=True),
    )


def short_names(words: Iterable[str]) -> dict[str, str]:
    """A name for each model that is short and still its own: of a path the last part, of a factory the part before its weights."""
    short = {word: word.partition("@")[0] if ":" in word else PurePath(word).name for word in words}
    taken = Counter(short.values())
    return {word: name if taken[name] == 1 else word for word, name in short.items()}


def _interval(bounds: Sequence[float], form: str, factor: float = 1) -> str:
    low, high = (format(factor * bound, form) for bound in bounds)
    return f"[{low}, {high}]"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
