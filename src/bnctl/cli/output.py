"""Where a report goes: data to stdout, talk to stderr."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bnctl.cli.options import Format
from bnctl.errors import BnctlError, WorkerError

if TYPE_CHECKING:
    from bnctl.commands.setup import Progress
    from bnctl.report import Report


_STAND_INS = {"±": "+-", "·": "-", "…": "...", "≤": "<=", "≥": ">="}


def write_any_character() -> None:
    """Let stdout and stderr take characters that their encoding lacks, as in a pipe under ``LC_ALL=C``: by stand-ins, or a question mark."""

    def stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        character = error.object[error.start]
        if "\udc80" <= character <= "\udcff":  # a byte of a file's name
            return bytes([ord(character) - 0xDC00]), error.start + 1
        return _STAND_INS.get(character, "?"), error.start + 1

    codecs.register_error("bnctl", stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in {"strict", "surrogateescape"}:
            stream.reconfigure(errors="bnctl")


def is_first_worker() -> bool:
    """Whether this process speaks: all but one of the workers that torchrun started are silent."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def write_report(report: Report, form: Format, *, quiet: bool, verbose: bool) -> None:
    """Write a report to stdout in the form that was asked for; nothing for a person who wants quiet.

    A reader that leaves early, as in `bnctl check ... | head`, does not change how the process ends.
    """
    try:
        if form is Format.JSON:
            write_json(report.to_dict())
        elif form is not Format.HUMAN:
            from bnctl.cli.formats import render

            sys.stdout.write(render(report, form, verbose=verbose))
        elif not quiet:
            _show(report, verbose=verbose)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would raise again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(report: Report, *, verbose: bool) -> None:
    from rich.console import Console

    from bnctl.cli.render import show

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with 1, which means something else here

    show(report, Plain(), verbose=verbose)


def write_json(document: dict[str, Any]) -> None:
    """One JSON document; NaN and infinity, which JSON lacks, were replaced before."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_error(error: BnctlError, *, as_json: bool, command: str) -> None:
    """An error with its next step to stderr, and as a document to stdout where JSON was asked for."""
    from rich.console import Console
    from rich.text import Text

    if not is_first_worker():
        if isinstance(error, WorkerError):
            return  # the other one says it, and so does the first
        as_json = False
    text = Text("error: ", style="bold red").append(error.message, style="default not bold")
    if error.hint:
        text.append("\n hint: ", style="bold").append(error.hint, style="default not bold")
    # The terminal wraps by itself; a path with a line break in it could be neither copied nor searched for.
    Console(stderr=True).print(text, soft_wrap=True)
    if as_json:
        write_json(_error_document(error, command))


def _error_document(error: BnctlError, command: str) -> dict[str, Any]:
    from bnctl import __version__
    from bnctl.report import SCHEMA_VERSION

    return {
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


@contextmanager
def progress_bar(*, show: bool) -> Iterator[Progress]:
    """A progress bar on stderr, where a person looks; silence elsewhere."""
    from bnctl.commands.setup import no_progress

    if not show or not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if not task.speed else f"{task.speed:.1f}/s")

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield tell
