"""The command line. It parses, calls one function of :mod:`bnctl.commands`, and writes the report."""

from __future__ import annotations

import gc
import os
import re
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from bnctl.cli import config, options
from bnctl.cli.common import reporting
from bnctl.cli.heap import keep_freed_memory
from bnctl.cli.output import (
    end_in_order,
    flushed,
    open_closed_streams,
    progress_bar,
    unexpected,
    write_any_character,
    write_error,
    write_json,
)
from bnctl.commands.setup import Setup
from bnctl.errors import BnctlError, ExitCode, Interrupted, ModelError, UsageError
from bnctl.models.save import Target
from bnctl.report import Report
from bnctl.selection import Selection

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
"""click's base class, from whichever click typer uses: newer versions bring their own."""

app = typer.Typer(
    name="bnctl",
    help="Batch normalisation surgery: insert, fold, recalibrate, export, verify, bench.",
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
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


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
    eps: Annotated[float, typer.Option("--eps", min=1e-12, max=1.0, help="of the inserted layers")] = 1e-5,
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
    merge_branches: Annotated[
        bool,
        typer.Option(
            "--merge-branches", help="let parallel linear layers that are summed become one (RepVGG, MobileOne)"
        ),
    ] = False,
    pad_exact: Annotated[
        bool,
        typer.Option(
            "--pad-exact", help="fold into a zero-padded convolution behind, by one more input channel of ones"
        ),
    ] = False,
    no_untie: Annotated[
        bool, typer.Option("--no-untie", help="leave a layer whose weight is tied, instead of giving it one of its own")
    ] = False,
    freeze_initializers: Annotated[
        bool, typer.Option("--freeze-initializers", help="ONNX: take the defaults of the graph's inputs for constants")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not compare before and after")] = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> Report:
    """Fold every affine that can be folded exactly into its neighbouring linear operators."""
    from bnctl.commands.fold import run_fold
    from bnctl.commands.rounds import FoldOptions

    target = Target.of(output, force=force, dry_run=dry_run)
    return run_fold(
        model,
        target,
        setup,
        selection=Selection(where, skip),
        options=FoldOptions(merge_branches, not no_untie, freeze_initializers, pad_exact),
        tolerance=tolerance,
        verify=not no_verify,
    )


@app.command()
@reporting
def recalibrate(
    setup: Setup,
    model: options.ModelWord,
    output: options.Output = None,
    method: Annotated[
        options.Method, typer.Option("--method", help="exact, batch (PreciseBN), or ema (as training would)")
    ] = options.Method.EXACT,
    where: options.Where = None,
    skip: options.Skip = None,
    prior: Annotated[
        str | None,
        typer.Option("--prior", metavar="N|auto", help="old statistics count as N samples; auto: by held-out accuracy"),
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(
            "--until", metavar="X", help="stop when every mean is known to X standard deviations, such as 0.01"
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            "--augment", metavar="WORD", help="training-time transform of each sample, package.module:callable"
        ),
    ] = None,
    hold_out: Annotated[
        int, typer.Option("--hold-out", metavar="N", min=0, help="one labelled sample in N judges the result; 0: none")
    ] = 5,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", metavar="PP", help="write nothing unless accuracy falls by at most PP points"),
    ] = None,
    on_bad_batch: Annotated[
        options.OnBadBatch, typer.Option("--on-bad-batch", help="what to do about NaN and infinity in the data")
    ] = options.OnBadBatch.REFUSE,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="BYTES", help="for paused forward passes, such as 4G; else half of what is free"
        ),
    ] = None,
    autocast: Annotated[
        options.Autocast | None, typer.Option("--autocast", help="run operators that do not mind in this type")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where an interrupted run stopped")] = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> Report:
    """New running statistics from data; under torchrun, with the data shared among the workers."""
    from bnctl.commands.recalibrate import run_recalibrate
    from bnctl.commands.recalibration import Recalibration

    if hold_out == 1:
        raise UsageError(
            "--hold-out 1 would leave no sample to recalibrate on", hint="for example --hold-out 5, or 0 for none"
        )
    how = Recalibration(
        method=method.value,
        selection=Selection(where, skip),
        prior=options.parse_prior(prior),
        until=until,
        on_bad_batch=on_bad_batch.value,
        memory_bytes=options.parse_bytes(memory),
        autocast=None if autocast is None else autocast.value,
        hold_out=hold_out,
        max_drop_pp=max_drop,
        augment=augment,
        resume=resume,
    )
    return run_recalibrate(model, Target.of(output, force=force, dry_run=dry_run), setup, how)


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
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=2, help="worker processes to begin with; 5, or fewer by --max-processes"),
    ] = None,
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
        processes=min(5, max_processes) if processes is None else processes,
        max_processes=max_processes,
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
    context: typer.Context,
    code: Annotated[str | None, typer.Argument(metavar="CODE", help="BN101; without it, all codes")] = None,
    json: options.AsJson = False,
) -> None:
    """What a code means, why, and what to do."""
    from rich.console import Console

    from bnctl.cli.render import show_code
    from bnctl.codes import CODES
    from bnctl.commands.explain import document, find_code

    context.find_root().obj["json"] = json
    if json:
        write_json(document([find_code(code)] if code is not None else CODES.values()))
        return
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

    progress = partial(progress_bar, show=not quiet)
    raise typer.Exit(run_demo(output, force=force, quiet=quiet, progress=progress))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every way out has its exit code, and no traceback reaches a user."""
    open_closed_streams()
    write_any_character()
    gc.set_threshold(50_000, 20, 50)  # graphs are many objects and few cycles
    keep_freed_memory()
    end_in_order()
    code = run(sys.argv[1:] if arguments is None else arguments)
    gc.freeze()  # the process ends: nothing is gained by looking through a model once more
    sys.exit(flushed(code))


def run(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    shared: dict[str, Any] = {"json": _asks_for_json(arguments)}  # what the commands and this function tell each other

    def fail(error: BnctlError) -> int:
        write_error(error, as_json=shared["json"], command=command)
        return int(error.exit_code)

    try:
        group, options = _command_line()
        settings, path = config.read_config(Path.cwd())
        shared["trusted-factories"] = config.trusted_factories(settings, path)
        defaults = config.default_map(settings, options, path, os.environ)
        result = group.main(arguments, prog_name="bnctl", standalone_mode=False, default_map=defaults, obj=shared)
        if result == ExitCode.INTERRUPTED:  # newer versions of typer turn Ctrl-C into this, without a word
            raise Interrupted("interrupted")
        return int(result or 0)
    except BnctlError as error:
        return fail(error)
    except (typer.Abort, KeyboardInterrupt):
        return fail(Interrupted("interrupted"))
    except _ClickException as error:
        message = error.format_message()  # type: ignore[attr-defined]
        option = next(iter(re.findall(r"--[a-z][a-z-]+", message)), "")
        given = any(word.partition("=")[0] == option for word in arguments)
        source = None if given else config.origin(option, command, settings, path, os.environ)
        asked = " ".join(["bnctl", *([command] if command in options else []), "--help"])
        return fail(UsageError(message, hint=asked if source is None else f"the value is from {source}; {asked}"))
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return int(ExitCode.OK)  # rich's answer to a reader that left, such as `bnctl --help | head`
        hint = "take sys.exit out of the factory or the loader"
        return fail(ModelError(f"code of the model or of the data called sys.exit({error.code!r})", hint=hint))
    except Exception as error:
        return fail(unexpected(error))


def _command_line() -> tuple[Any, dict[str, dict[str, config.Option]]]:
    """The click group, and the options of each command."""
    group: Any = typer.main.get_command(app)
    options = {}
    for parameter in (*group.params, *(p for sub in group.commands.values() for p in sub.params)):
        if parameter.param_type_name == "option":
            parameter.show_envvar = False  # they all have one, and `--help` is to be read
            if parameter.is_flag:
                parameter.metavar = ""
    for name, sub in group.commands.items():
        found = (p for p in sub.params if p.param_type_name == "option")
        options[name] = {p.name: config.Option(p.multiple, p.is_flag) for p in found}
    return group, options


def _asks_for_json(arguments: list[str]) -> bool:
    """Whether JSON was asked for, as far as the words tell before they are parsed: they may be wrong, and that error is to be JSON too."""
    return "--json" in arguments or "--format=json" in arguments or ("--format", "json") in pairwise(arguments)
