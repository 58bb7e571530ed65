"""The document that every command ends in: what was done where, why not, and what was measured. Its JSON form is versioned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnctl import __version__
from bnctl.errors import ExitCode

SCHEMA_VERSION = 1
"""Of the document that ``report.schema.json`` describes."""

_SAID = {"passed": "{}", "verdict": "{}", "enough": "{}", "method": "method {}", "opset": "opset {}", "bn_nodes": "{} BatchNorm nodes",
         "nodes": "{} nodes in all", "linear": "{} linear layers", "added_parameters": "{} parameters added"}  # fmt: skip
"""How an entry of a summary reads; the others read as "5 folded"."""


@dataclass(frozen=True)
class Artifact:
    """A model on disk or in memory."""

    path: str
    sha256: str | None = None


@dataclass(frozen=True)
class Site:
    """One layer in a report.

    Args:
        name: the layer.
        action: "folded", "inserted", "recalibrated", "left", ...
        into: layers that took it up.
        code, reason: why it was left, see :mod:`bnctl.codes`.
        details: further fields of the command's own (drift, statistics).
    """

    name: str
    action: str
    into: tuple[str, ...] = ()
    code: str | None = None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "action": self.action,
            "into": list(self.into),
            "code": self.code,
            "reason": self.reason,
            **self.details,
        }


@dataclass(frozen=True)
class Report:
    """What a command did.

    Args:
        command: its name.
        source: the model that went in.
        output: the model that was written; None for a dry run and for commands that write none.
        sites: the layers.
        summary: counts.
        verification: errors before and after; None where nothing was compared.
        elapsed_s: wall time in seconds.
        details: further top-level fields of the command's own.
        notes: sentences for a person.
        exit_code: how the process ends.
    """

    command: str
    source: Artifact | None = None
    output: Artifact | None = None
    sites: tuple[Site, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    verification: Mapping[str, Any] | None = None
    elapsed_s: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exit_code: ExitCode = ExitCode.OK

    def headline(self) -> str:
        """The summary in one line for a person, such as "6 found · 5 inserted · 1 left"."""
        shown = {key: value for key, value in self.summary.items() if not isinstance(value, (list, dict))}
        if isinstance(shown.get("passed"), bool):
            failed = "inconclusive" if self.exit_code is ExitCode.INCONCLUSIVE else "FAILED"
            shown["passed"] = "passed" if shown["passed"] else failed
        if isinstance(shown.get("enough"), bool):
            shown["enough"] = "enough" if shown["enough"] else "too few"
        return " · ".join(_SAID.get(key, f"{{}} {key}").format(value) for key, value in shown.items())

    def to_dict(self) -> dict[str, Any]:
        """The versioned JSON document; numbers that are not finite, which JSON lacks, are None."""
        document: dict[str, Any] = _finite(self._document())
        return document

    def _document(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.command,
            "bnctl": __version__,
            "source": _artifact(self.source),
            "output": _artifact(self.output),
            "sites": [site.to_dict() for site in self.sites],
            "summary": dict(self.summary),
            "verification": None if self.verification is None else dict(self.verification),
            "elapsed_s": round(self.elapsed_s, 3),
            **self.details,
            "notes": list(self.notes),
        }


def _artifact(artifact: Artifact | None) -> dict[str, Any] | None:
    return None if artifact is None else {"path": artifact.path, "sha256": artifact.sha256}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
