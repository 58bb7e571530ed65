"""A report for a person: Rich tables on a terminal, the verdict in the last line. For scripts there is JSON."""

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from bnctl.cli.tables import Table, samples, tables
from bnctl.errors import ExitCode
from bnctl.outcome import NO_EVIDENCE

if TYPE_CHECKING:
    from bnctl.codes import Code
    from bnctl.report import Report

_STYLES = {
    "folded": "green", "foldable": "green", "inserted": "green", "insertable": "green", "recalibrated": "green",
    "left": "yellow", "finding": "red", "pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow",
}  # fmt: skip
_GAP = 2
"""Blanks between columns."""

_LEAST = 12
"""Width in letters below which a cell that may wrap is not pressed."""

_VERDICTS = {ExitCode.OK: "green", ExitCode.FAILED: "bold red", ExitCode.INCONCLUSIVE: "bold yellow"}


def show(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Print a report."""
    for table in tables(report, verbose=verbose):
        if table.columns and table.columns[0].cells:
            shown = _rich(table)
            needed = sum((column.min_width or 0) + _GAP for column in shown.columns)
            width = console.width
            console.width = max(width, needed)  # better lines that the terminal breaks than figures that are cut
            console.print(shown)
            console.width = width
        if table.rest:
            console.print(Text(table.rest, style="dim"))
        console.print()
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))
    if report.verification is not None:
        console.print(_verification(report.verification))
    console.print(_headline(report))
    if report.output is not None:
        # A path that wraps cannot be copied.
        console.print(Text(f"wrote {report.output.path}"), soft_wrap=True)


def _rich(table: Table) -> rich_table.Table:
    shown = rich_table.Table(
        title=table.title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False, padding=(0, _GAP, 0, 0)
    )  # fmt: skip
    for column in table.columns:
        justify: Any = "right" if column.right else "left"
        longest = max(map(cell_len, (column.heading, *column.cells)))
        least = min(longest, _LEAST) if column.wraps else longest
        shown.add_column(column.heading, justify=justify, overflow="fold", no_wrap=not column.wraps, min_width=least)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        styled = zip(cells, table.columns, strict=True)
        shown.add_row(*(Text(cell, style=_STYLES.get(cell, "") if c.status else "") for cell, c in styled))
    return shown


def _verification(v: Any) -> Text:
    text = Text("equal", style="green") if v["passed"] else Text("DIFFERENT", style="bold red")
    if v["reason"] == NO_EVIDENCE:
        text = Text("NOTHING SHOWN", style="bold yellow")
    text.append(f" on {samples(v)}", style="default not bold")
    if v["max_rel_error"] is not None:
        errors = f": error {v['max_rel_error']:.2g} relative, {v['max_abs_error']:.2g} absolute; tolerance {v['tolerance']:.2g}"
        text.append(errors, style="default not bold")
    if v.get("label_flips"):
        text.append(f"; {v['label_flips']} labels flip", style="default not bold")
    if v["passed"] and v.get("note"):
        text.append(f"\n{v['note']}", style="yellow not bold")
    if not v["passed"]:
        text.append(f"\n{v['reason']}", style="red not bold")
        if v.get("first_difference"):
            text.append(f"\nthe two part at {v['first_difference']['layer']}", style="default not bold")
    return text


def _headline(report: Report) -> Text:
    text = Text(f"{report.command}: ", style="bold")
    text.append(report.headline(), style=_VERDICTS.get(report.exit_code, ""))
    return text.append(f" · {report.elapsed_s:.1f} s", style="dim not bold")


def show_code(code: Code, console: Console) -> None:
    """Print the page of a reason code."""
    body = Text()
    body.append(f"{code.why}\n\n")
    if code.example:
        body.append("Example:\n", style="bold")
        body.append(f"{indent(code.example, '    ')}\n\n", style="dim")
    body.append("What to do: ", style="bold")
    body.append(code.remedy)
    console.print(Panel(body, title=f"{code.id}: {code.title}", title_align="left", width=min(console.width, 100)))
