"""`bnctl check`: a linter for BatchNorm. Findings have codes and decide the exit code."""

from __future__ import annotations

from dataclasses import replace

from bnctl.commands.inspect import inspect_model
from bnctl.commands.setup import Setup
from bnctl.errors import ExitCode
from bnctl.report import Report, Site


def run_check(word: str, setup: Setup) -> Report:
    """Report what is suspicious about a model's normalisation layers; exit code 1 if anything is.

    BN401 a layer that could be folded was not · BN402 a dead channel (scale 0) · BN105 batch statistics in inference · BN115 statistics that are not finite.
    """
    model = setup.open(word)
    report = inspect_model(model, setup.example(model, run=False))
    findings = []
    for site in report.sites:
        if site.action == "foldable":
            findings.append(
                _finding(
                    site, "BN401", f"can be folded into {', '.join(site.into)}" if site.into else "changes nothing"
                )
            )
        elif site.code in {"BN105", "BN115"}:
            findings.append(_finding(site, site.code, site.reason))
        if zeros := site.details.get("zero_scales"):
            findings.append(_finding(site, "BN402", f"scale 0 in {zeros} of {site.details['channels']} channels"))
    return replace(
        report,
        command="check",
        sites=tuple(findings),
        summary={"found": report.summary["found"], "findings": len(findings)},
        details={},
        exit_code=ExitCode.FAILED if findings else ExitCode.OK,
    )


def _finding(site: Site, code: str | None, reason: str | None) -> Site:
    return Site(site.name, "finding", (), code, reason)
