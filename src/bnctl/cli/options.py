"""The options that commands share, each in one place."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bnctl.errors import UsageError


class Format(StrEnum):
    """How a report is written."""

    HUMAN = "human"
    JSON = "json"
    MARKDOWN = "markdown"
    GITHUB = "github"
    JUNIT = "junit"


class Device(StrEnum):
    """Where models run."""

    CPU = "cpu"
    CUDA = "cuda"


class Method(StrEnum):
    """How recalibration gathers statistics."""

    EXACT = "exact"
    BATCH = "batch"


_MODEL = "Model"
_DATA = "Data"
_REPORT = "Report"

ModelWord = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="model.onnx, model.pt2, a bundle folder, or package.module:callable\\[@weights]"
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="out.onnx, out.pt2, or a folder (a bundle)")
]
Force = Annotated[bool, typer.Option("--force", help="replace an existing output")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show the plan, write nothing")]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="state dict (.safetensors, .pt) for factories that name none",
        rich_help_panel=_MODEL,
    ),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="argument of a factory, JSON values; repeatable",
        rich_help_panel=_MODEL,
    ),
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--factory", metavar="WORD", help="build bundles with this instead of what they name", rich_help_panel=_MODEL
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="let .pt2 archives and bundles run code that they bring", rich_help_panel=_MODEL)
]
DeviceOption = Annotated[Device, typer.Option("--device", help="where models run", rich_help_panel=_MODEL)]
Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="intra-op threads of each model",
        rich_help_panel=_MODEL,
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME:]SHAPE[:DTYPE]",
        help="example shape, as 1x3x224x224; repeatable",
        rich_help_panel=_DATA,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="WORD",
        help="folder/, file.npz, package.module:loader, or random:N with --input",
        rich_help_panel=_DATA,
    ),
]
Preprocess = Annotated[
    Path | None,
    typer.Option(
        "--preprocess", metavar="FILE", help="JSON: resize, crop, mean, std, channel order", rich_help_panel=_DATA
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="samples per batch", rich_help_panel=_DATA)
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="use at most this many samples", rich_help_panel=_DATA)
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="of synthetic data and random orders", rich_help_panel=_DATA)
]
Where = Annotated[list[str] | None, typer.Option("--where", metavar="GLOB", help="only these layers; repeatable")]
Skip = Annotated[list[str] | None, typer.Option("--skip", metavar="GLOB", help="not these layers; repeatable")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance", metavar="X", min=0.0, help="largest relative error that counts as equal; default from the dtype"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="the same as --format json", rich_help_panel=_REPORT)]
FormatOption = Annotated[
    Format, typer.Option("--format", help="how the report is written to stdout", rich_help_panel=_REPORT)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="no progress, no report for a person", rich_help_panel=_REPORT)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show every layer", rich_help_panel=_REPORT)]


def parse_model_args(words: list[str] | None) -> dict[str, Any]:
    """``key=value`` with JSON values; what is no JSON is a string.

    Raises:
        UsageError: there is no ``=``.
    """
    found: dict[str, Any] = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--model-arg {word!r} is not of the form key=value", hint="for example --model-arg num_classes=10"
            )
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
