"""A report for other programs: Markdown for a pull request, annotations for GitHub, JUnit for a CI server. One small renderer each."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from bnctl.cli.options import Format
from bnctl.errors import ExitCode

if TYPE_CHECKING:
    from bnctl.report import Report


def render(report: Report, form: Format) -> str:
    """The report in one of the machine-readable text forms, ending in a newline."""
    return {Format.MARKDOWN: markdown, Format.GITHUB: github, Format.JUNIT: junit}[form](report) + "\n"


def markdown(report: Report) -> str:
    """A heading, the summary, and a table of the layers."""
    lines = [
        f"### bnctl {report.command}",
        "",
        " · ".join(f"{key} **{value}**" for key, value in _summary(report).items()),
        "",
    ]
    if report.verification is not None:
        v = report.verification
        lines += [
            f"{'Equal' if v['passed'] else '**Different**'} on {v['samples']} samples, largest relative error {v['max_rel_error']}.",
            "",
        ]
    for gate in report.details.get("gates", ()):
        lines.append(f"- `{gate['expression']}`: **{gate['verdict']}**, {gate['detail']}")
    if report.sites:
        lines += ["| layer | action | into | code | why |", "|---|---|---|---|---|"]
        lines += [
            f"| `{s.name}` | {s.action} | {', '.join(s.into)} | {s.code or ''} | {_cell(s.reason)} |"
            for s in report.sites
        ]
    return "\n".join([*lines, *(f"> {note}" for note in report.notes)])


def github(report: Report) -> str:
    """Workflow commands: an error where the command failed, a warning per finding, one notice with the summary."""
    lines = []
    level = (
        "error"
        if report.exit_code is ExitCode.FAILED
        else "warning"
        if report.exit_code is ExitCode.INCONCLUSIVE
        else "notice"
    )
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
        lines.append(f"::error title=bnctl {report.command}::{_message(str(report.verification['reason']))}")
    summary = " · ".join(f"{key} {value}" for key, value in _summary(report).items())
    return "\n".join([*lines, f"::{level} title=bnctl {report.command}::{_message(summary)}"])


def junit(report: Report) -> str:
    """One test case per gate or finding, or one for the whole command; inconclusive is an error, not a failure."""
    suite = ElementTree.Element("testsuite", name=f"bnctl {report.command}", time=f"{report.elapsed_s:.3f}")
    cases: list[tuple[str, str, str]] = [
        (g["expression"], g["verdict"], g["detail"]) for g in report.details.get("gates", ())
    ]
    cases += [(f"{s.name} {s.code}", "fail", s.reason or "") for s in report.sites if s.action == "finding"]
    if report.verification is not None:
        cases.append(
            ("equivalence", "pass" if report.verification["passed"] else "fail", str(report.verification["reason"]))
        )
    verdicts = {ExitCode.OK: "pass", ExitCode.INCONCLUSIVE: "inconclusive"}
    for name, verdict, detail in cases or [(report.command, verdicts.get(report.exit_code, "fail"), "")]:
        case = ElementTree.SubElement(suite, "testcase", classname=f"bnctl.{report.command}", name=name)
        if verdict != "pass":
            ElementTree.SubElement(case, "failure" if verdict == "fail" else "error", message=detail)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    return ElementTree.tostring(suite, encoding="unicode")


def _summary(report: Report) -> dict[str, object]:
    return {key: value for key, value in report.summary.items() if not isinstance(value, (list, dict))}


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
