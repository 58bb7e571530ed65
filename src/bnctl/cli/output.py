"""Where a report goes: data to stdout, talk to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bnctl.cli.options import Format
from bnctl.errors import BnctlError

if TYPE_CHECKING:
    from bnctl.commands.setup import Progress
    from bnctl.report import Report


def write_report(report: Report, form: Format, *, quiet: bool, verbose: bool) -> None:
    """Write a report to stdout in the form that was asked for; nothing for a person who wants quiet."""
    if form is Format.JSON:
        write_json(report.to_dict())
    elif form is not Format.HUMAN:
        from bnctl.cli.formats import render

        sys.stdout.write(render(report, form))
    elif not quiet:
        from rich.console import Console

        from bnctl.cli.render import show

        show(report, Console(), verbose=verbose)


def write_json(document: dict[str, Any]) -> None:
    """One JSON document; NaN and infinity, which JSON lacks, were replaced before."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def write_error(error: BnctlError, *, as_json: bool, command: str) -> None:
    """An error with its next step to stderr, and as a document to stdout where JSON was asked for."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    text = Text("error: ", style="bold red").append(error.message, style="default not bold")
    if error.hint:
        text.append("\n hint: ", style="bold").append(error.hint, style="default not bold")
    console.print(text)
    if as_json:
        from bnctl import __version__
        from bnctl.report import SCHEMA_VERSION

        write_json(
            {
                "schema_version": SCHEMA_VERSION,
                "command": command,
                "bnctl": __version__,
                "error": {
                    "kind": type(error).__name__,
                    "message": error.message,
                    "hint": error.hint,
                    "exit_code": int(error.exit_code),
                },
                "verification": getattr(error, "verification", None),
            }
        )


@contextmanager
def progress_bar(*, show: bool) -> Iterator[Progress]:
    """A progress bar on stderr, where a person looks; silence elsewhere."""
    from bnctl.commands.setup import no_progress

    if not show or not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield tell
