"""Where a report goes: data to stdout, talk to stderr."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.cli.options import Format
from bnctl.cli.printable import printable, printable_all
from bnctl.errors import BnctlError, ExitCode, UsageError, WorkerError

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


def end_in_order() -> None:
    """Whoever ends the process politely (SIGTERM) gets what Ctrl-C gets: no process and no file is left behind. Under torchrun, that sees to it."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and "WORLD_SIZE" not in os.environ:
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def open_closed_streams() -> None:
    """Let there be a stdout and a stderr, also where the caller has closed them (``>&-``): what is written there is lost, as the caller wanted."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 it is the stream now


def flushed(code: int) -> int:
    """The exit code after what is left in stdout was written: another one where a command ended well, and cannot say so."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _lose_stdout()
        if not isinstance(error, BrokenPipeError):
            write_error(unwritten(error), as_json=False, command="")
            return code or int(ExitCode.USAGE)
    return code


def unwritten(error: OSError, report: Report | None = None) -> UsageError:
    """What to say where stdout takes no more: the disk below it is full, say."""
    hint = "make room for it, or send it elsewhere"
    if report is not None:
        written = f"{report.output.path} was written" if report.output is not None else "nothing else was written"
        hint = f"{hint}; {written}, and the command itself ended with exit code {int(report.exit_code)}"
    return UsageError(f"the report cannot be written to stdout: {error.strerror or error}", hint=hint)


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def unexpected(error: Exception) -> BnctlError:
    """What to say of an exception that nobody expected: stdout is full, or it is a bug."""
    if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
        return unwritten(error)
    import traceback

    if os.environ.get("BNCTL_TRACEBACK"):
        traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return BnctlError(
        f"internal error in {Path(last.filename).name}:{last.lineno}: {type(error).__name__}: {error}",
        hint="this is a bug in bnctl: please report it with the output of the same command under BNCTL_TRACEBACK=1",
    )


def _lose_stdout() -> None:
    """What is still in the buffer would raise again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_first_worker() -> bool:
    """Whether this process speaks: all but one of the workers that torchrun started are silent."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def write_report(report: Report, form: Format, *, quiet: bool, verbose: bool) -> None:
    """Write a report to stdout in the form that was asked for; nothing for a person who wants quiet.

    A reader that leaves early, as in `bnctl check ... | head`, does not change how the process ends.

    Raises:
        UsageError: stdout takes no more.
    """
    try:
        if form is Format.JSON:
            write_json(report.to_dict())
        elif form is not Format.HUMAN:
            from bnctl.cli.formats import render

            sys.stdout.write(render(printable_all(report), form, verbose=verbose))
        elif not quiet:
            _show(printable_all(report), verbose=verbose)
        sys.stdout.flush()
    except BrokenPipeError:
        _lose_stdout()
    except OSError as error:
        _lose_stdout()
        raise unwritten(error, report) from error


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
    text = Text("error: ", style="bold red").append(printable(error.message), style="default not bold")
    if error.hint:
        text.append("\n hint: ", style="bold").append(printable(error.hint), style="default not bold")
    with suppress(OSError):  # the exit code says it all the same
        # The terminal wraps by itself; a path with a line break in it could be neither copied nor searched for.
        Console(stderr=True).print(text, soft_wrap=True)
    if as_json:
        try:
            write_json(_error_document(error, command))
            sys.stdout.flush()
        except OSError:
            _lose_stdout()


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
