"""`bnctl demo`: the whole tour on the fixture that ships with the package."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.bench.spec import LatencyOptions
from bnctl.commands.bench import run_bench_command
from bnctl.commands.export import run_export
from bnctl.commands.fold import run_fold
from bnctl.commands.guard import HOLD_OUT
from bnctl.commands.insert import run_insert
from bnctl.commands.inspect import run_inspect
from bnctl.commands.recalibrate import run_recalibrate
from bnctl.commands.recalibration import Recalibration
from bnctl.commands.setup import Progress, Setup
from bnctl.commands.verify import run_verify
from bnctl.errors import ExitCode, UsageError
from bnctl.fixture import fixture_path
from bnctl.models.save import Target
from bnctl.report import Report
from bnctl.selection import Selection

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LATENCY = LatencyOptions(processes=3, max_processes=3, block_ms=5, rounds=9)
"""Short, so that the tour is: a gate would start with five processes."""


@dataclass(frozen=True)
class Step:
    """One stop of the tour.

    Args:
        says: what a visitor learns.
        command: what a user would type, with its words as a list.
        run: does it.
    """

    says: str
    command: list[str]
    run: Callable[[Progress], Report]


def run_demo(
    folder: Path, *, force: bool, quiet: bool = False, progress: Callable[[], AbstractContextManager[Progress]]
) -> ExitCode:
    """Inspect, insert, fold, recalibrate, export, verify and bench, on digits; print each step, then one table.

    Args:
        folder: for what the tour writes.
        force: replace an earlier tour.
        quiet: print nothing.
        progress: opens a progress bar, which is gone before anything is printed.

    Returns:
        FAILED where any step failed: the tour is a test too.

    Raises:
        UsageError: the folder exists and `force` is not set, or holds something else than an earlier tour.
    """
    from rich.console import Console

    _prepare(folder, force=force)
    console = Console(quiet=quiet)
    worst = ExitCode.OK
    for number, step in enumerate(_steps(folder), start=1):
        console.print(f"\n[bold]{number}. {step.says}[/bold]", highlight=False)
        console.print(
            f"   $ bnctl {shlex.join(map(_short, step.command))}", style="dim", highlight=False, soft_wrap=True
        )
        with progress() as tell:
            report = step.run(tell)
        _tell(report, console)
        worst = max(worst, report.exit_code)
    with progress() as tell:
        table = _table(folder, tell)
    console.print()
    console.print(table)
    console.print(f"\nEverything that was written lies in {folder}.", highlight=False)
    return worst


PLAIN, BN = "bnctl.fixture:plain", "bnctl.fixture:with_bn"


def _steps(folder: Path) -> list[Step]:
    plain = f"{PLAIN}@{fixture_path('digits_plain.safetensors')}"
    bn = f"{BN}@{fixture_path('digits_bn.safetensors')}"
    calibration, test, shifted = (str(fixture_path(f"{n}.npz")) for n in ("calibration", "test", "shifted_calibration"))

    def at(name: str) -> Target:
        return Target(folder / name)

    def on(data: str, progress: Progress) -> Setup:
        return Setup(data=data, batch_size=100, progress=progress)

    everything = Selection()
    options: dict[str, Any] = {"selection": everything, "tolerance": None}
    return [
        Step(
            "A trained network without normalisation: where could BatchNorm go?",
            ["inspect", plain, "--data", calibration],
            lambda tell: run_inspect(plain, on(calibration, tell)),
        ),
        Step(
            "Insert it there; the function stays what it was, and the result trains.",
            ["insert", plain, "--data", calibration, "-o", str(folder / "inserted")],
            lambda tell: run_insert(plain, at("inserted"), on(calibration, tell), eps=1e-5, **options),
        ),
        Step(
            "Fold it away again: the round trip is a free self-test.",
            ["fold", str(folder / "inserted"), "--data", calibration, "-o", str(folder / "round_trip")],
            lambda tell: run_fold(
                str(folder / "inserted"), at("round_trip"), on(calibration, tell), verify=True, **options
            ),
        ),
        Step(
            "Its twin, trained with BatchNorm: export with BatchNorm kept.",
            ["export", bn, "--data", calibration, "--keep-bn", "-o", str(folder / "kept.onnx")],
            lambda tell: run_export(
                bn, at("kept.onnx"), on(calibration, tell), keep_bn=True, static_batch=False, tolerance=None
            ),
        ),
        Step(
            "Fold the ONNX file; torch is not needed for that.",
            ["fold", str(folder / "kept.onnx"), "-o", str(folder / "folded.onnx")],
            lambda tell: run_fold(str(folder / "kept.onnx"), at("folded.onnx"), Setup(), verify=True, **options),
        ),
        Step(
            "Is it the same function? On 600 real images, runtime optimisations off.",
            ["verify", str(folder / "kept.onnx"), str(folder / "folded.onnx"), "--data", test],
            lambda tell: run_verify(
                str(folder / "kept.onnx"), str(folder / "folded.onnx"), on(test, tell), tolerance=None
            ),
        ),
        Step(
            "The camera changed: less contrast, more noise. Recalibrate the statistics on images of the new kind; one in five judges the result.",
            ["recalibrate", bn, "--data", shifted, "-o", str(folder / "recalibrated")],
            lambda tell: run_recalibrate(bn, at("recalibrated"), on(shifted, tell), Recalibration(hold_out=HOLD_OUT)),
        ),
        Step(
            "And ship that: ONNX, BatchNorm folded.",
            ["export", str(folder / "recalibrated"), "--data", shifted, "-o", str(folder / "recalibrated.onnx")],
            lambda tell: run_export(
                str(folder / "recalibrated"),
                at("recalibrated.onnx"),
                on(shifted, tell),
                keep_bn=False,
                static_batch=False,
                tolerance=None,
            ),
        ),
    ]


def _short(word: str) -> str:
    """A word of a command with paths relative to the current folder."""
    return word.replace(f"{Path.cwd()}{os.sep}", "")


def _tell(report: Report, console: Console) -> None:
    console.print(f"   {report.headline()} · {report.elapsed_s:.1f} s", highlight=False)
    if report.verification is not None:
        v = report.verification
        word = "[green]equal[/green]" if v["passed"] else "[bold red]different[/bold red]"
        console.print(
            f"   {word} on {v['samples']} samples, largest relative error {v['max_rel_error']:.1e}", highlight=False
        )


def _table(folder: Path, progress: Progress) -> Table:
    """Accuracy before and after on both kinds of images, and latency, of all that was made; measured with `bench`."""
    from rich.table import Table

    models = {
        "trained with BN (torch)": f"{BN}@{fixture_path('digits_bn.safetensors')}",
        "exported, BN kept": str(folder / "kept.onnx"),
        "folded": str(folder / "folded.onnx"),
        "recalibrated": str(folder / "recalibrated"),
        "recalibrated, folded": str(folder / "recalibrated.onnx"),
    }
    plain = {
        "trained without BN (torch)": f"{PLAIN}@{fixture_path('digits_plain.safetensors')}",
        "BN inserted": str(folder / "inserted"),
        "BN folded again": str(folder / "round_trip"),
    }
    table = Table(title="before and after", title_justify="left", title_style="bold", header_style="bold")
    for column in ("model", "top-1, test", "top-1, shifted", "latency"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for group in (plain, models):
        words = list(group.values())
        test, shifted = (_accuracies(words, name, progress) for name in ("test.npz", "shifted.npz"))
        ratios = _ratios(words, progress)
        for name, word in group.items():
            table.add_row(name, f"{100 * test[word]:.1f} %", f"{100 * shifted[word]:.1f} %", ratios[word])
        table.add_section()
    table.caption = "latency relative to the first row of its part, with 95 % interval; ONNX Runtime optimises and folds by itself, as by default"
    return table


def _accuracies(words: list[str], data: str, progress: Progress) -> dict[str, float]:
    setup = Setup(data=str(fixture_path(data)), batch_size=100, progress=progress)
    rows = run_bench_command(words, setup, gates=(), accuracy=True, latency=False, options=LATENCY).details["accuracy"]
    top1 = [row for row in rows if row["metric"] == "top1"]
    return {words[0]: top1[0]["baseline"]} | {row["model"]: row["candidate"] for row in top1}


def _ratios(words: list[str], progress: Progress) -> dict[str, str]:
    setup = Setup(data=str(fixture_path("test.npz")), batch_size=8, progress=progress)
    rows = run_bench_command(words, setup, gates=(), accuracy=False, latency=True, options=LATENCY).details["latency"]
    found = {words[0]: "1"}
    for row in rows:
        if row["gated"]:
            low, high = row["ci95"]
            found[row["candidate"]] = f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return found


_MARKS = {"inserted", "round_trip", "kept.onnx", "folded.onnx", "recalibrated", "recalibrated.onnx"}


def _prepare(folder: Path, *, force: bool) -> None:
    """An empty folder; of an earlier tour only what a tour writes is removed."""
    if folder.exists():
        names = {p.name for p in folder.iterdir()} if folder.is_dir() else {str(folder)}
        if names - _MARKS:
            raise UsageError(
                f"{folder} holds other things than a tour: {', '.join(sorted(names - _MARKS)[:3])}",
                hint="give another folder with -o",
            )
        if names and not force:
            raise UsageError(f"{folder} exists", hint="give --force, or another folder with -o")
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
