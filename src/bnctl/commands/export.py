"""`bnctl export`: a model as ONNX, BN folded or kept, checked by running both sides."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from bnctl.commands.fold import fold_model
from bnctl.commands.setup import Setup
from bnctl.errors import ModelError, UsageError
from bnctl.models.model import Model
from bnctl.models.save import Target, as_onnx, write_onnx
from bnctl.report import Artifact, Report


def run_export(
    word: str,
    target: Target,
    setup: Setup,
    *,
    keep_bn: bool,
    static_batch: bool,
    tolerance: float | None,
) -> Report:
    """Export a model; the ONNX file is compared with the model that was given, on the example and on other batch sizes.

    Raises:
        UsageError: the output is not an `.onnx` file.
        ModelError: the model cannot be exported, or the export lost a BatchNorm that was to be kept.
        EquivalenceError: the export does not compute the same.
    """
    from bnctl.commands.equivalence import Varied, check_equivalence, require

    started = time.perf_counter()
    if target.path is not None and target.path.suffix != ".onnx":
        hint = "give -o out.onnx; bnctl fold writes .pt2 and bundles too"
        raise UsageError(f"{target.path}: export writes ONNX", hint=hint)
    model = setup.open(word)
    target.check(model.kind)
    example = setup.example(model)
    folded, report = model, Report("export", Artifact(model.word, model.sha256))
    if not keep_bn:
        outcome = fold_model(model, example, tolerance=tolerance, dry_run=target.dry_run, device=setup.device)
        folded, report = outcome.model, replace(outcome.report, command="export")
    if target.path is None:
        return report
    native = as_onnx(folded, example, static_batch=static_batch)
    exported = Model("onnx", native, str(target.path))
    vary: tuple[Varied, ...] = ("values",) if static_batch else ("values", "batch size")  # other sizes are fixed
    verification = check_equivalence(model, exported, example, vary=vary, tolerance=tolerance)
    require(verification, "export", word)
    kept = Counter(node.op_type for node in native.graph)["BatchNormalization"]
    if keep_bn and model.kind == "torch" and not kept and _has_norm(model):
        raise ModelError(
            f"{word}: the exporter dropped the BatchNorms", hint="please report this; export without --keep-bn"
        )
    artifact = write_onnx(native, target.path, force=target.force)
    return replace(
        report,
        output=artifact,
        verification=verification.to_dict(),
        summary={
            **report.summary,
            "bn_nodes": kept,
            "nodes": sum(1 for _ in native.graph),
            "opset": native.opset_imports.get(""),
        },
        elapsed_s=time.perf_counter() - started,
    )


def _has_norm(model: Model) -> bool:
    import torch

    assert isinstance(model.native, torch.nn.Module)
    return any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.native.modules())
