"""From a model in memory to the output that the user named; its form decides the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.errors import ModelError, UsageError
from bnctl.models.digest import sha256_file
from bnctl.models.model import Model
from bnctl.models.write import atomic_path, refuse_existing

if TYPE_CHECKING:
    from bnctl.data.batches import Batch
    from bnctl.report import Artifact


_NOT_FOLDERS = frozenset(".pt .pth .ckpt .safetensors .bin .h5 .pb .tflite .npz .json .txt .zip .pkl".split())
"""Suffixes of files that bnctl does not write; a bundle of such a name would be a surprise."""


@dataclass(frozen=True)
class Target:
    """Where a command writes, and how.

    Args:
        path: its form decides the format; None for a dry run.
        force: replace an existing output.
    """

    path: Path | None
    force: bool = False

    @classmethod
    def of(cls, output: Path | None, *, force: bool, dry_run: bool) -> Target:
        """From the options of a command.

        Raises:
            UsageError: neither an output nor a dry run was asked for.
        """
        if output is None and not dry_run:
            raise UsageError(
                "where to write?", hint="give -o out.onnx, -o out.pt2 or -o folder/, or --dry-run to see the plan"
            )
        return cls(None if dry_run else output, force)

    @property
    def dry_run(self) -> bool:
        """Nothing is to be written."""
        return self.path is None

    def check(self, kind: str) -> None:
        """Refuse, before any work is done, an output that cannot be written in the end."""
        if self.path is not None:
            check_output(self.path, kind, force=self.force)

    def save(self, model: Model, example: Batch | None) -> Artifact | None:
        """Write the model; nothing on a dry run."""
        return None if self.path is None else save_model(model, self.path, example=example, force=self.force)


def check_output(output: str | Path, kind: str, *, force: bool) -> Path:
    """Refuse, before any work is done, an output that cannot be written in the end.

    Raises:
        UsageError: it exists and `force` is not set, its suffix is unknown, or the format does not fit the model.
    """
    path = Path(output)
    if path.suffix in _NOT_FOLDERS:
        raise UsageError(
            f"{path}: cannot write {path.suffix}",
            hint="give out.onnx, out.pt2 or a folder (a bundle with model.safetensors in it)",
        )
    if kind == "onnx" and path.suffix != ".onnx":
        raise UsageError(f"{path}: an ONNX model is written as .onnx", hint="give -o out.onnx")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist", hint="create it first")
    refuse_existing(path, force=force)
    return path


def save_model(
    model: Model, output: str | Path, *, example: Batch | None, force: bool = False, static_batch: bool = False
) -> Artifact:
    """Write a model as what the output's form says: `.onnx`, `.pt2`, or a folder (a bundle).

    Args:
        model: the model.
        output: where to.
        example: inputs with which a torch model is exported.
        force: replace an existing output.
        static_batch: fix the batch size of an exported graph.

    Raises:
        UsageError: the output cannot be written, see :func:`check_output`.
        ModelError: the model cannot be brought into this format.
    """
    from bnctl.report import Artifact

    path = check_output(output, model.kind, force=force)
    if path.suffix == ".onnx":
        return write_onnx(as_onnx(model, example, static_batch=static_batch), path, force=force)
    if path.suffix == ".pt2":
        _write_pt2(model, path, example, force, static_batch)
    else:
        _write_bundle(model, path, example, force)
    return Artifact(str(output), sha256_file(path / "bnctl.json" if path.is_dir() else path))


def as_onnx(model: Model, example: Batch | None, *, static_batch: bool = False) -> Any:
    """A model as ONNX, BN as it is."""
    if model.kind == "onnx":
        return model.native
    from bnctl.engines.torch.export import to_onnx

    return to_onnx(_program(model, example, static_batch), name=model.word)


def write_onnx(native: Any, path: Path, *, force: bool) -> Artifact:
    """Write an ONNX model, check the file, and only then put it in place.

    Raises:
        ModelError: the checker refuses it.
    """
    from bnctl.models.onnx_file import save_onnx
    from bnctl.report import Artifact

    save_onnx(native, path, force=force, check=_check_onnx)
    return Artifact(str(path), sha256_file(path))


def _check_onnx(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path.name}: the result is not valid ONNX: {reason}", hint="please report the model; nothing was written"
        ) from error


def _program(model: Model, example: Batch | None, static_batch: bool) -> Any:
    from bnctl.data.resize import resized
    from bnctl.engines.torch.engine import copy_module
    from bnctl.engines.torch.export import to_program

    if model.program is not None:
        return model.program
    if example is None:
        raise UsageError("an exported graph needs example inputs", hint="give --input 1x3x224x224 or --data")
    if not static_batch and example.size < 2:
        example = resized(example, 2)
    module: Any = model.native
    return to_program(copy_module(module, model.word), example, dynamic_batch=not static_batch, name=model.word)


def _write_pt2(model: Model, path: Path, example: Batch | None, force: bool, static_batch: bool) -> None:
    import torch

    from bnctl.engines.torch.export import quiet

    program = _program(model, example, static_batch)
    with atomic_path(path, force=force) as new, quiet():
        torch.export.save(program, new)


def _write_bundle(model: Model, path: Path, example: Batch | None, force: bool) -> None:
    from bnctl.data.synthetic import specs_of
    from bnctl.models.bundle import save_bundle

    if model.origin is None:
        raise UsageError(
            f"{model.word} has no Python class to rebuild, so it cannot be a bundle",
            hint="write it as .pt2 or .onnx, or start from its factory",
        )
    words = [str(spec) for spec in specs_of(example)] if example is not None else list(model.origin.inputs)
    source = {"path": model.word, "sha256": model.sha256}
    native: Any = model.native
    save_bundle(path, native, model.origin, source=source, inputs=words, force=force)
