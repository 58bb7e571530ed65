"""A report for other programs: Markdown for a pull request, annotations for GitHub, JUnit for a CI server. One small renderer each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from bnctl.cli.options import Format
from bnctl.cli.tables import Table, samples, tables
from bnctl.errors import ExitCode
from bnctl.outcome import NO_EVIDENCE

if TYPE_CHECKING:
    from bnctl.report import Report


def render(report: Report, form: Format, *, verbose: bool = False) -> str:
    """The report in one of the machine-readable text forms, ending in a newline."""
    if form is Format.MARKDOWN:
        return markdown(report, verbose=verbose) + "\n"
    return {Format.GITHUB: github, Format.JUNIT: junit}[form](report) + "\n"


def markdown(report: Report, *, verbose: bool = False) -> str:
    """A heading, the summary, what was verified, and the tables."""
    parts = [f"### bnctl {report.command}", f"**{report.headline()}**"]
    if report.verification is not None:
        parts.append(_verification(report.verification))
    for table in tables(report, verbose=verbose):
        parts.append("\n".join([f"#### {_cell(table.title)}", "", *_rows(table)]))
        if table.rest:
            parts.append(table.rest)
    return "\n\n".join([*parts, *(f"> {note}" for note in report.notes)])


def _verification(v: Mapping[str, Any]) -> str:
    word = "Equal" if v["passed"] else "**Nothing shown**" if v["reason"] == NO_EVIDENCE else "**Different**"
    if v["max_rel_error"] is None:
        return f"{word} on {samples(v)}."
    return f"{word} on {samples(v)}: largest relative error {v['max_rel_error']:.2g}, tolerance {v['tolerance']:.2g}."


def _rows(table: Table) -> list[str]:
    lines = [
        [column.heading for column in table.columns],
        ["--:" if column.right else "---" for column in table.columns],
        *zip(*(column.cells for column in table.columns), strict=True),
    ]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines] if len(lines) > 2 else []


def github(report: Report) -> str:
    """Workflow commands: an error where the command failed, a warning per finding, one notice with the summary."""
    lines = []
    level = {ExitCode.OK: "notice", ExitCode.INCONCLUSIVE: "warning"}.get(report.exit_code, "error")
    for gate in report.details.get("gates", ()):
        if gate["verdict"] != "pass":
            kind = "error" if gate["verdict"] == "fail" else "warning"
            lines.append(f"::{kind} title=bnctl {_property(gate['expression'])}::{_message(gate['detail'])}")
    lines += [
        f"::warning title=bnctl {s.code}::{_message(f'{s.name}: {s.reason}')}"
        for s in report.sites
        if s.action == "finding"
    ]
    if report.verification is not None and not report.verification["passed"]:
        kind = "warning" if report.exit_code is ExitCode.INCONCLUSIVE else "error"
        lines.append(f"::{kind} title=bnctl {report.command}::{_message(str(report.verification['reason']))}")
    return "\n".join([*lines, f"::{level} title=bnctl {report.command}::{_message(report.headline())}"])


def junit(report: Report) -> str:
    """One test case per gate or finding, or one for the whole command; inconclusive is an error, not a failure."""
    suite = ElementTree.Element("testsuite", name=f"bnctl {report.command}", time=f"{report.elapsed_s:.3f}")
    cases: list[tuple[str, str, str]] = [
        (g["expression"], g["verdict"], g["detail"]) for g in report.details.get("gates", ())
    ]
    cases += [(f"{s.name} {s.code}", "fail", s.reason or "") for s in report.sites if s.action == "finding"]
    if report.verification is not None:
        reason = report.verification["reason"]
        verdict = "pass" if report.verification["passed"] else "inconclusive" if reason == NO_EVIDENCE else "fail"
        cases.append(("equivalence", verdict, str(reason)))
    verdicts = {ExitCode.OK: "pass", ExitCode.INCONCLUSIVE: "inconclusive"}
    for name, verdict, detail in cases or [(report.command, verdicts.get(report.exit_code, "fail"), "")]:
        case = ElementTree.SubElement(suite, "testcase", classname=f"bnctl.{report.command}", name=name)
        if verdict != "pass":
            ElementTree.SubElement(case, "failure" if verdict == "fail" else "error", message=detail)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    return ElementTree.tostring(suite, encoding="unicode")


def _cell(text: str) -> str:
    """Text of a model's (names of layers) in a table: it may neither end the cell nor become markup."""
    for mark in ("\\", "|", "<", "*", "_", "`"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", " ")


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
