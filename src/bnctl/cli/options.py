"""The options that commands share, each in one place."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

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
    EMA = "ema"


class OnBadBatch(StrEnum):
    """What to do about a batch that holds NaN or infinity."""

    REFUSE = "refuse"
    SKIP = "skip"


class Autocast(StrEnum):
    """Type in which operators run that do not mind."""

    BF16 = "bf16"
    FP16 = "fp16"


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
        help="folder/, file.npz, file.parquet, shards/*.tar, hf:NAME, package.module:loader, or random:N with --input",
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
DataWorkers = Annotated[
    int, typer.Option("--workers", metavar="N", min=0, help="threads that decode images ahead", rich_help_panel=_DATA)
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", min=0, max=2**32 - 1, help="of synthetic data and random orders", rich_help_panel=_DATA
    ),
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


def parse_bytes(word: str | None) -> int | None:
    """A number of bytes: ``500M``, ``4G``, ``1.5GiB``, ``4000000``.

    Raises:
        UsageError: it has another form.
    """
    if word is None:
        return None
    found = re.fullmatch(r"(?P<number>\d+(\.\d*)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", word.strip().lower())
    if found is None or (found["binary"] and not found["unit"]):
        raise UsageError(f"--memory {word}: not a number of bytes", hint="for example --memory 4G")
    return int(float(found["number"]) * (1024 if found["binary"] else 1000) ** " kmgt".index(found["unit"] or " "))


def parse_prior(word: str | None) -> float | Literal["auto"]:
    """A number of samples, or "auto".

    Raises:
        UsageError: it is neither.
    """
    if word == "auto":
        return "auto"
    try:
        return 0.0 if word is None else float(word)
    except ValueError:
        raise UsageError(
            f"--prior {word}: neither a number of samples nor auto", hint="for example --prior 256"
        ) from None
