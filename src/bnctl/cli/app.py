"""The command line. It parses, calls one function of :mod:`bnctl.commands`, and writes the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bnctl.cli import config, options
from bnctl.cli.common import reporting
from bnctl.cli.output import progress_bar, write_error
from bnctl.commands.setup import Setup
from bnctl.errors import BnctlError, ExitCode, UsageError
from bnctl.models.save import Target
from bnctl.report import Report
from bnctl.selection import Selection

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
"""click's base class, from whichever click typer uses: newer versions bring their own."""

app = typer.Typer(
    name="bnctl",
    help="Batch normalisation surgery: insert, fold, recalibrate, export, verify, bench.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "BNCTL", "help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="show the version", is_eager=True)] = False,
) -> None:
    if version:
        from bnctl import __version__

        sys.stdout.write(f"bnctl {__version__}\n")
        raise typer.Exit


@app.command()
@reporting
def inspect(setup: Setup, model: options.ModelWord) -> Report:
    """Every normalisation layer, and every place where one could go."""
    from bnctl.commands.inspect import run_inspect

    return run_inspect(model, setup)


@app.command()
@reporting
def insert(
    setup: Setup,
    model: options.ModelWord,
    output: options.Output = None,
    where: options.Where = None,
    skip: options.Skip = None,
    eps: Annotated[float, typer.Option("--eps", min=1e-12, help="of the inserted layers")] = 1e-5,
    tolerance: options.Tolerance = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> Report:
    """Insert BatchNorm after every conv and linear layer that feeds an activation; the function is preserved."""
    from bnctl.commands.insert import run_insert

    target = Target.of(output, force=force, dry_run=dry_run)
    return run_insert(model, target, setup, selection=Selection(where, skip), eps=eps, tolerance=tolerance)


@app.command()
@reporting
def fold(
    setup: Setup,
    model: options.ModelWord,
    output: options.Output = None,
    where: options.Where = None,
    skip: options.Skip = None,
    tolerance: options.Tolerance = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not compare before and after")] = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> Report:
    """Fold every affine that can be folded exactly into its neighbouring linear operators."""
    from bnctl.commands.fold import run_fold

    target = Target.of(output, force=force, dry_run=dry_run)
    return run_fold(model, target, setup, selection=Selection(where, skip), tolerance=tolerance, verify=not no_verify)


@app.command()
@reporting
def recalibrate(
    setup: Setup,
    model: options.ModelWord,
    output: options.Output = None,
    method: Annotated[
        options.Method, typer.Option("--method", help="exact, or batch (PreciseBN)")
    ] = options.Method.EXACT,
    where: options.Where = None,
    skip: options.Skip = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> Report:
    """New running statistics from data."""
    from bnctl.commands.recalibrate import run_recalibrate

    target = Target.of(output, force=force, dry_run=dry_run)
    return run_recalibrate(model, target, setup, method=method.value, selection=Selection(where, skip))


@app.command()
@reporting
def export(
    setup: Setup,
    model: options.ModelWord,
    output: options.Output = None,
    keep_bn: Annotated[
        bool, typer.Option("--keep-bn", help="keep BatchNorm as nodes; by default it is folded")
    ] = False,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="fix the batch size; by default it is dynamic")
    ] = False,
    tolerance: options.Tolerance = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> Report:
    """Write ONNX, with BatchNorm folded or kept."""
    from bnctl.commands.export import run_export

    target = Target.of(output, force=force, dry_run=dry_run)
    return run_export(model, target, setup, keep_bn=keep_bn, static_batch=static_batch, tolerance=tolerance)


@app.command()
@reporting
def verify(
    setup: Setup,
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help="the model that is right by definition")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="the model to be judged")],
    tolerance: options.Tolerance = None,
) -> Report:
    """Whether two models compute the same, and the first layer that differs."""
    from bnctl.commands.verify import run_verify

    return run_verify(baseline, candidate, setup, tolerance=tolerance)


@app.command()
@reporting
def bench(
    setup: Setup,
    baseline: Annotated[str, typer.Argument(metavar="BASELINE")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATE...")],
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="EXPR", help='"latency.ratio<=1.05", "top1.drop<=0.5"; repeatable'),
    ] = None,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="accuracy only")] = False,
    no_accuracy: Annotated[bool, typer.Option("--no-accuracy", help="latency only")] = False,
    processes: Annotated[int, typer.Option("--processes", min=2, help="worker processes to begin with")] = 5,
    max_processes: Annotated[int, typer.Option("--max-processes", min=2, help="when to give up on the precision")] = 15,
    precision: Annotated[
        float, typer.Option("--precision", min=0.0001, help="half width of the interval of the ratio")
    ] = 0.01,
) -> Report:
    """Accuracy and latency before and after; gates for CI."""
    from bnctl.bench.spec import LatencyOptions
    from bnctl.commands.bench import run_bench_command

    how = LatencyOptions(
        threads=setup.threads,
        device=setup.device,
        processes=processes,
        max_processes=max(processes, max_processes),
        precision=precision,
        seed=setup.seed,
    )
    words = [baseline, *candidates]
    return run_bench_command(
        words, setup, gates=gate or (), accuracy=not no_accuracy, latency=not no_latency, options=how
    )


@app.command()
@reporting
def check(setup: Setup, model: options.ModelWord) -> Report:
    """A linter for BatchNorm: exit code 1 if there are findings."""
    from bnctl.commands.check import run_check

    return run_check(model, setup)


@app.command()
def explain(
    code: Annotated[str | None, typer.Argument(metavar="CODE", help="BN101; without it, all codes")] = None,
) -> None:
    """What a code means, why, and what to do."""
    from rich.console import Console

    from bnctl.cli.render import show_code
    from bnctl.codes import CODES
    from bnctl.commands.explain import find_code

    console = Console()
    if code is not None:
        show_code(find_code(code), console)
        return
    for entry in CODES.values():
        console.print(f"[bold]{entry.id}[/bold]  {entry.title}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for what the tour writes")] = Path("demo-out"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """The whole tour on the fixture that ships with the package."""
    from bnctl.commands.demo import run_demo

    with progress_bar(show=not quiet) as progress:
        raise typer.Exit(run_demo(output, force=force, progress=progress))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every way out has its exit code, and no traceback reaches a user."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    as_json = "--json" in arguments or "--format=json" in arguments or " ".join(arguments).find("--format json") >= 0
    command = next((word for word in arguments if not word.startswith("-")), "")
    try:
        group = typer.main.get_command(app)
        settings, path = config.read_config(Path.cwd())
        known = {name: {p.name for p in sub.params if p.name} for name, sub in group.commands.items()}  # type: ignore[attr-defined]
        result = group.main(
            arguments,
            prog_name="bnctl",
            standalone_mode=False,
            default_map=config.default_map(settings, known, path),
            obj={"trusted-factories": settings.get("trusted-factories", [])},
        )
        return int(result or 0)
    except BnctlError as error:
        write_error(error, as_json=as_json, command=command)
        return int(error.exit_code)
    except typer.Abort:
        sys.stderr.write("interrupted\n")
        return int(ExitCode.INTERRUPTED)
    except _ClickException as error:
        write_error(
            UsageError(str(getattr(error, "message", error)), hint=f"bnctl {command} --help".replace("  ", " ")),
            as_json=as_json,
            command=command,
        )
        return int(ExitCode.USAGE)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitCode.OK)
    except Exception as error:
        return _internal(error, as_json=as_json, command=command)


def _internal(error: Exception, *, as_json: bool, command: str) -> int:
    import os
    import traceback

    if os.environ.get("BNCTL_TRACEBACK"):
        traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    wrapped = BnctlError(
        f"internal error in {place}: {type(error).__name__}: {error}",
        hint="this is a bug in bnctl: please report it with the output of the same command under BNCTL_TRACEBACK=1",
    )
    write_error(wrapped, as_json=as_json, command=command)
    return int(ExitCode.INTERNAL)
