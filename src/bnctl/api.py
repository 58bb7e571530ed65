"""The Python face: ``fold``, ``insert``, ``recalibrate``, ``verify``, ``load``. What goes in is left alone; the same kind comes out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bnctl.commands.fold import fold_model
from bnctl.commands.insert import DEFAULT_EPS, insert_model
from bnctl.commands.rounds import FoldOptions
from bnctl.data.batches import Batch, as_batches
from bnctl.errors import DataError, UsageError
from bnctl.models.model import Model
from bnctl.report import Report
from bnctl.selection import Selection

if TYPE_CHECKING:
    import torch

    from bnctl.verification import Verification

Globs = str | Iterable[str] | None


@dataclass(frozen=True, eq=False)
class Result:
    """What a surgery gives back.

    Args:
        model: of the same kind as the model that went in; a path gives the opened model.
        report: what was done where, and why not; ``report.to_dict()`` is the JSON document.
    """

    model: Any
    report: Report
    _model: Model
    _example: Batch | None = None

    def save(
        self, output: str | os.PathLike[str], *, inputs: Any = None, factory: str | None = None, force: bool = False
    ) -> None:
        """Write the model: `.onnx`, `.pt2`, or a folder (a bundle).

        Args:
            output: its form decides the format.
            inputs: example inputs, for `.onnx` and `.pt2` of a torch model; by default those that the surgery was given.
            factory: ``"package.module:callable"`` that builds the model that went in, for a bundle of a model that came as an object.
            force: replace an existing output.

        Raises:
            UsageError: the output exists, or a bundle is asked for and nobody knows how to build the model.
        """
        from dataclasses import replace

        from bnctl.models.origin import Origin
        from bnctl.models.save import save_model

        model = self._model
        if factory is not None and model.origin is not None:
            model = replace(model, origin=Origin(factory, {}, model.origin.edits))
        if model.origin is not None and not model.origin.factory:
            model = replace(model, origin=None)
        path = Path(output)
        known = self._example if path.suffix in {".onnx", ".pt2"} else None
        save_model(model, path, example=known if inputs is None else as_example(inputs), force=force)


def fold(
    model: Any,
    inputs: Any = None,
    *,
    where: Globs = None,
    skip: Globs = None,
    merge_branches: bool = False,
    pad_exact: bool = False,
    untie: bool = True,
    freeze_initializers: bool = False,
    tolerance: float | None = None,
    verify: bool = True,
) -> Result:
    """Fold every affine that can be folded exactly into its neighbouring linear operators.

    Where there is nothing to fold, the result holds the given model itself, and no copy.

    Args:
        model: an ``nn.Module``, an ``onnx.ModelProto``, an ``onnx_ir.Model``, or a MODEL word (a path, ``package.module:callable``).
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; an ONNX model can do without.
        where, skip: globs over layer names.
        merge_branches: let parallel linear operators that are summed become one (RepVGG, MobileOne).
        pad_exact: fold into convolutions behind that pad with zeros, by one more input channel of ones.
        untie: give a tied weight an array of its own where only one of its layers changes.
        freeze_initializers: take the defaults of an ONNX graph's inputs for constants.
        tolerance: largest relative error that counts as equal; by default it follows from the dtype.
        verify: compare before and after, on these inputs and on other batch sizes.

    Raises:
        EquivalenceError: the folded model does not compute the same.
        ModelError: the model cannot be captured.
    """
    opened = as_model(model)
    example = _example(opened, inputs)
    outcome = fold_model(
        opened,
        example,
        selection=Selection(where, skip),
        options=FoldOptions(merge_branches, untie, freeze_initializers, pad_exact),
        tolerance=tolerance,
        verify=verify,
    )
    return Result(_as_given(model, outcome.model), outcome.report, outcome.model, example)


def insert(
    model: Any,
    data: Iterable[Any],
    *,
    where: Globs = None,
    skip: Globs = None,
    eps: float = DEFAULT_EPS,
    tolerance: float | None = None,
) -> Result:
    """Insert BatchNorm after every conv and linear layer that feeds an activation, so that in eval mode the model computes what it did.

    With mean mu and variance sigma^2 of the layer's outputs over the data: ``running_mean = mu``, ``running_var = sigma^2``,
    ``gamma = sqrt(sigma^2 + eps)``, ``beta = mu``.

    Args:
        model: as for :func:`fold`.
        data: batches: tensors, ``(x, y)`` or dicts; gone through more than once.
        where, skip: globs over layer names.
        eps: of the inserted layers.
        tolerance: as for :func:`fold`.
    """
    opened = as_model(model)
    outcome = insert_model(opened, as_batches(data), selection=Selection(where, skip), eps=eps, tolerance=tolerance)
    return Result(_as_given(model, outcome.model), outcome.report, outcome.model)


def recalibrate(
    model: Any,
    data: Iterable[Any],
    *,
    method: Literal["exact", "batch", "ema"] = "exact",
    where: Globs = None,
    skip: Globs = None,
    prior: float = 0.0,
    until: float | None = None,
) -> Result:
    """New running statistics from data.

    Args:
        model: as for :func:`fold`.
        data: batches, gone through more than once; labels are not used.
        method: "exact": statistics of activations that already went through the final statistics of the layers before; "batch": every layer normalises with the
            statistics of its own batch (Ioffe & Szegedy 2015, algorithm 2); "ema": as training would leave them.
        where, skip: globs over layer names.
        prior: old statistics count as so many more samples (Schneider et al. 2020).
        until: use no more of the data than it takes to know every channel's mean to so many standard deviations.
    """
    from bnctl.commands.recalibrate import recalibrate_model
    from bnctl.commands.recalibration import Recalibration

    opened = as_model(model)
    how = Recalibration(method=method, selection=Selection(where, skip), prior=prior, until=until)
    outcome = recalibrate_model(opened, as_batches(data), how)
    return Result(_as_given(model, outcome.model), outcome.report, outcome.model)


def verify(baseline: Any, candidate: Any, data: Iterable[Any], *, tolerance: float | None = None) -> Verification:
    """Compare two models on data."""
    from bnctl.runtime import open_runner
    from bnctl.verification import compare_runners

    return compare_runners(
        open_runner(as_model(baseline)), open_runner(as_model(candidate)), as_batches(data), tolerance=tolerance
    )


def load(folder: str | os.PathLike[str], *, trust: bool = False, factory: Any = None) -> torch.nn.Module:
    """A bundle, back as the user's own class.

    Args:
        folder: the bundle.
        trust: call whatever factory the bundle names.
        factory: build with this instead.

    Raises:
        UntrustedError: nobody vouches for the bundle's factory.
    """
    from bnctl.models.bundle import load_bundle

    return load_bundle(folder, trust=trust, factory=factory)[0]


def as_model(model: Any) -> Model:
    """Anything that stands for a model, as the commands take it.

    Raises:
        UsageError: it is none of the kinds that bnctl knows.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, (str, os.PathLike)):
        from bnctl.models.open import open_model

        return open_model(os.fspath(model))
    package = type(model).__module__.partition(".")[0]
    if package == "onnx_ir":
        return Model("onnx", model, "the model")
    if package == "onnx":
        from bnctl.models.onnx_file import from_proto

        return Model("onnx", from_proto(model, "the model"), "the model")
    import torch

    from bnctl.models.open import require_values
    from bnctl.models.origin import Origin

    if isinstance(model, torch.nn.Module):
        require_values(model, type(model).__name__)
        return Model("torch", model, type(model).__name__, origin=Origin(""))
    raise UsageError(f"{type(model).__name__} is no model", hint="give an nn.Module, an onnx.ModelProto, or a path")


def as_example(inputs: Any) -> Batch:
    """A tensor, a tuple of arguments, or a dict of keyword arguments, as a batch.

    Raises:
        DataError: there is no sample in it.
    """
    if isinstance(inputs, Batch):
        batch = inputs
    elif isinstance(inputs, dict):
        batch = Batch((), dict(inputs))
    else:
        batch = Batch(inputs if isinstance(inputs, tuple) else (inputs,))
    if not batch.size:
        raise DataError(
            "the example holds no sample: samples are counted by the first input that has a length, and that is 0",
            hint="give at least one sample; an input that is empty on purpose can be fixed in a wrapper around the model",
        )
    return batch


def _example(model: Model, inputs: Any) -> Batch:
    if inputs is not None:
        return as_example(inputs)
    if model.kind == "torch":
        raise UsageError(
            "a torch model is captured by running it: it needs inputs",
            hint="bnctl.fold(model, torch.randn(2, 3, 224, 224))",
        )
    from bnctl.data.synthetic import random_batch
    from bnctl.engines.onnx.signature import input_specs

    specs = input_specs(model.native, model.word)
    return random_batch(specs) if specs else Batch()


def _as_given(given: Any, model: Model) -> Any:
    """An ``onnx.ModelProto`` comes back as one."""
    if type(given).__module__.partition(".")[0] == "onnx":
        import onnx_ir

        native: Any = model.native
        return onnx_ir.to_proto(native)
    return model.native
