"""From a model in memory to the output that the user named; its form decides the format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnctl.errors import ModelError, UsageError
from bnctl.models.digest import sha256_file
from bnctl.models.model import Model
from bnctl.models.write import atomic_path, refuse_existing

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from bnctl.data.batches import Batch
    from bnctl.models.origin import Origin
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

    return Artifact(str(path), save_onnx(native, path, force=force, check=partial(_check_onnx, native)))


def _check_onnx(native: Any, path: Path) -> None:
    """See whether the checker takes a file.

    Args:
        native: the model that is in it.
        path: the file.

    Raises:
        ModelError: it does not.
    """
    from bnctl.models.onnx_file import source_of

    reason = _complaint(path)
    if reason is None:
        return
    source = source_of(native)
    theirs = None if source is None else _complaint(source)
    if source is not None and theirs is not None:
        raise ModelError(
            f"{source.name} is not valid ONNX, and the result would not be, either: {theirs}",
            hint="mend it first: onnx.checker.check_model says the same of it; another opset may do (onnx.version_converter)",
        )
    raise ModelError(
        f"{path.name}: the result is not valid ONNX: {reason}", hint="please report the model; nothing was written"
    )


def _complaint(path: Path) -> str | None:
    """What the checker says of a file."""
    import onnx

    try:
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError:
            proto = onnx.load(path, load_external_data=False)
            if not _give_shapes(proto):
                raise
            onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def _give_shapes(proto: onnx.ModelProto) -> bool:
    """Give some shape to inputs and outputs that have none, and say whether there are such: runtimes take them, the checker does not."""
    types = [
        value.type.tensor_type
        for value in (*proto.graph.input, *proto.graph.output)
        if value.type.HasField("tensor_type")
    ]
    missing = [tensor for tensor in types if not tensor.HasField("shape")]
    for tensor in missing:
        tensor.shape.SetInParent()
    return bool(missing)


def _program(model: Model, example: Batch | None, static_batch: bool) -> Any:
    from bnctl.data.resize import resized
    from bnctl.engines.torch.copies import workable
    from bnctl.engines.torch.export import exported_axes, to_program

    if model.program is not None:
        return model.program
    if example is None:
        raise UsageError(
            "an exported graph needs example inputs",
            hint="give --input 1x3x224x224 or --data; in Python, save(..., inputs=...)",
        )
    module: Any = model.native
    dynamic = exported_axes(module) if model.dynamic_axes is None else model.dynamic_axes
    any_batch = not static_batch and (dynamic is None or any(0 in axes for axes in dynamic))
    if any_batch and example.size < 2:
        example = resized(example, 2)
    return to_program(
        workable(module, model.word),
        example,
        dynamic_batch=any_batch,
        dynamic_axes=dynamic,
        name=model.word,
    )


def _write_pt2(model: Model, path: Path, example: Batch | None, force: bool, static_batch: bool) -> None:
    import torch

    from bnctl.engines.torch.export import quiet

    program = _program(model, example, static_batch)
    with atomic_path(path, force=force) as new, quiet():
        try:
            torch.export.save(program, new)
        except NotImplementedError as error:  # containers of the user's own
            raise ModelError(
                f"torch.export cannot write {model.word}: {str(error).strip().splitlines()[0]}",
                hint="let its forward take and return tensors, in tuples, lists or dicts; or write .onnx or a bundle (-o folder/)",
            ) from error


def _write_bundle(model: Model, path: Path, example: Batch | None, force: bool) -> None:
    from bnctl.data.synthetic import specs_of
    from bnctl.models.bundle import save_bundle

    if model.origin is None or not model.origin.factory:
        raise UsageError(
            f"{model.word} has no Python class to rebuild, so it cannot be a bundle",
            hint="write it as .pt2 or .onnx, or start from its factory",
        )
    words = [str(spec) for spec in specs_of(example)] if example is not None else list(model.origin.inputs)
    source = {"path": model.word, "sha256": model.sha256}
    native: Any = model.native
    if example is not None:
        _check_rebuilt(native, model.origin, example, model.word)
    save_bundle(path, native, model.origin, source=source, inputs=words, force=force)


def _check_rebuilt(module: nn.Module, origin: Origin, example: Batch, word: str) -> None:
    """Build the model once more, and compare: what is neither in the state dict nor the same on every call of the factory is lost in a bundle.

    Inputs on which the model does not even agree with itself (random, or all zero) show nothing.

    Raises:
        ModelError: the second model is another one, or cannot be built.
    """
    from bnctl.engines.torch.state import keeping_state
    from bnctl.models.bundle import rebuilt
    from bnctl.models.factory import build_module, check_fit
    from bnctl.models.ties import named_tensors, set_tensor
    from bnctl.runtime.torch import TorchRunner
    from bnctl.verification import compare_runners

    with _other_seed():
        again = rebuilt(build_module(origin.factory, origin.args), origin)
    state = module.state_dict()
    check_fit(again, state, word)
    again.load_state_dict(state, assign=True)
    own = named_tensors(module)
    for name, buffer in again.named_buffers():
        if name not in state and name in own:
            set_tensor(again, name, buffer.to(own[name]))  # a bundle keeps the dtype of such a buffer
    device = str(next((tensor.device for tensor in own.values()), "cpu"))
    with keeping_state(module), keeping_state(again):
        baseline, candidate = TorchRunner(module, device=device), TorchRunner(again, device=device)
        if not compare_runners(baseline, baseline, [example], locate=False).passed:
            return
        verification = compare_runners(baseline, candidate, [example], locate=False)
    if not verification.passed:
        raise ModelError(
            f"{origin.factory} does not build the same model twice: {verification.reason}; a bundle would load as another model",
            hint="write it as .pt2 or .onnx, or make what it draws a registered buffer",
        )


@contextmanager
def _other_seed() -> Iterator[None]:
    """Other random numbers for a while, so that a model which depends on them shows; then the generators go on where they were."""
    import random

    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            seed = random.SystemRandom().getrandbits(32)
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
