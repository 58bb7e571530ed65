"""What every command that ends in a report has in common: its options, and the report's way out."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import typer

from bnctl.cli import options
from bnctl.cli.options import Format
from bnctl.cli.output import is_first_worker, progress_bar, write_report
from bnctl.commands.setup import Progress, Setup
from bnctl.errors import UsageError
from bnctl.report import Report


def _common(
    weights: options.Weights = None,
    model_arg: options.ModelArgs = None,
    factory: options.Factory = None,
    trust: options.Trust = False,
    device: options.DeviceOption = options.Device.CPU,
    threads: options.Threads = 1,
    input: options.Input = None,
    data: options.Data = None,
    preprocess: options.Preprocess = None,
    batch_size: options.BatchSize = 32,
    limit: options.Limit = None,
    workers: options.DataWorkers = 0,
    seed: options.Seed = 0,
    json: options.AsJson = False,
    format: options.FormatOption = Format.HUMAN,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Only its signature matters: these are the common options."""


COMMON = tuple(inspect.signature(_common, eval_str=True).parameters.values())


def reporting(command: Callable[..., Report]) -> Callable[..., None]:
    """Give a command the common options, hand them over as one `setup`, and write the report that it returns."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "setup"]

    @functools.wraps(command)
    def run(context: typer.Context, **given: Any) -> None:
        common = {p.name: given.pop(p.name) for p in COMMON}
        shared = context.find_root().obj
        form = _form(context, as_json=common["json"], form=common["format"])
        shared["json"] = form is Format.JSON  # also where a file or the environment asks for it
        speaks = is_first_worker()
        # What the user's code prints is talk: stdout is for the report.
        with redirect_stdout(sys.stderr), progress_bar(show=speaks and not common["quiet"]) as progress:
            report = command(_setup(common, shared["trusted-factories"], progress), **given)
        if speaks:
            write_report(report, form, quiet=common["quiet"], verbose=common["verbose"])
        raise typer.Exit(report.exit_code)

    keyword = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("context", keyword, annotation=typer.Context)
    parameters = [context, *(p.replace(kind=keyword) for p in (*own, *COMMON))]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__
    return run


def _form(context: typer.Context, *, as_json: bool, form: Format) -> Format:
    """``--json`` and ``--format`` say the same thing twice: what is said closer to the command line holds.

    Raises:
        UsageError: both are given, and contradict each other.
    """
    if not as_json or form is Format.JSON:
        return Format.JSON if as_json else form
    by_json, by_format = (
        _SOURCES.get(getattr(context.get_parameter_source(name), "name", ""), 0) for name in ("json", "format")
    )
    if by_json == by_format:
        raise UsageError(
            f"--json and --format {form} contradict each other", hint="leave one of them out (or its setting)"
        )
    return form if by_format > by_json else Format.JSON


_SOURCES = {"DEFAULT_MAP": 1, "ENVIRONMENT": 2, "COMMANDLINE": 3}


def _setup(common: dict[str, Any], trusted_factories: tuple[str, ...], progress: Progress) -> Setup:
    from bnctl.data.synthetic import parse_input

    return Setup(
        weights=common["weights"],
        model_args=options.parse_model_args(common["model_arg"]),
        trust=common["trust"],
        trusted_factories=trusted_factories,
        factory=common["factory"],
        inputs=tuple(parse_input(word) for word in common["input"] or ()),
        data=common["data"],
        preprocess=common["preprocess"],
        batch_size=common["batch_size"],
        limit=common["limit"],
        workers=common["workers"],
        seed=common["seed"],
        device=common["device"].value,
        threads=common["threads"],
        progress=progress,
    )
