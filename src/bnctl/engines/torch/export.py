"""From a module to a graph on disk: a ``torch.export`` program, and from there ONNX."""

from __future__ import annotations

import ast
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bnctl.errors import ModelError
from bnctl.runtime.tensors import as_tensors
from bnctl.runtime.torch import evaluating

if TYPE_CHECKING:
    import onnx_ir

    from bnctl.data.batches import Batch


def to_program(
    module: nn.Module,
    batch: Batch,
    *,
    dynamic_batch: bool = True,
    dynamic_axes: Sequence[Sequence[int]] | None = None,
    name: str = "the model",
) -> torch.export.ExportedProgram:
    """Export a module in eval mode.

    Args:
        module: left alone.
        batch: example inputs; two samples or more where the batch size is to be dynamic.
        dynamic_batch: let the first axis of every tensor input have any size (those that have the batch's size in the example).
        dynamic_axes: instead, the axes of each input, flattened, that are to have any size; `dynamic_batch` unset still fixes axis 0.
        name: of the model, for errors.

    Raises:
        ModelError: torch.export cannot capture the model, or its code fixes a size that is to be dynamic.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"torch.export cannot capture {name}: it is a ScriptModule", hint="export the module that was scripted"
        )
    if isinstance(module, fx.GraphModule) and (module._forward_hooks or module._forward_pre_hooks):
        raise ModelError(
            f"torch.export would leave out the hooks of {name}, which is a graph", hint="write a bundle (-o folder/)"
        )
    args, kwargs = as_tensors(batch, module)
    with evaluating(module), torch.no_grad(), quiet():
        try:
            leaves, tree = pytree.tree_flatten(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
            if dynamic_axes is None:
                shapes = _batch_axes(leaves, batch.size) if dynamic_batch else [None] * len(leaves)
            else:
                shapes = _axes_of_any_size(leaves, dynamic_axes, dynamic_batch)
            return torch.export.export(module, args, kwargs, dynamic_shapes=pytree.tree_unflatten(shapes, tree))
        except Exception as error:
            if "in output" in str(error) or "in the output" in str(error):
                hint = "let its forward return tensors, in tuples, lists or dicts, or write a bundle (-o folder/)"
            elif dynamic_axes is not None:
                hint = "the axes that may have any size must have size 2 or more in the example: see --input"
            elif dynamic_batch:
                hint = "fix the batch size (bnctl export --static-batch), or write a bundle (-o folder/)"
            else:
                hint = "write a bundle (-o folder/)"
            raise ModelError(f"torch.export cannot capture {name}: {_first_line(error)}", hint=hint) from error


def exported_axes(module: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """The axes of any size of each input, flattened, of a graph that torch.export has made, with its guards; None for any other module."""
    if not isinstance(module, fx.GraphModule) or not hasattr(module, "_guards_fn"):
        return None
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    return tuple(tuple(i for i, n in enumerate(getattr(v, "shape", ())) if not isinstance(n, int)) for v in values)


def to_onnx(program: torch.export.ExportedProgram, *, name: str = "the model") -> onnx_ir.Model:
    """An exported program as ONNX, one node per operator: constants are folded, BatchNorm stays BatchNorm.

    The exporter's own rewriting folds some BatchNorms; folding is ours to do and to report, so it is off. Stack traces and file paths that the exporter leaves
    in the metadata are dropped. A single output is called "output".

    Raises:
        ModelError: an operator has no ONNX form.
    """
    with quiet():
        try:
            converted = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
        except Exception as error:
            raise ModelError(
                f"torch.onnx cannot convert {name}: {_first_line(error)}", hint="write a .pt2 or a bundle instead"
            ) from error
    assert converted is not None
    model: onnx_ir.Model = converted.model
    return tidy(model)


def tidy(model: onnx_ir.Model) -> onnx_ir.Model:
    """Fold constants, inline the exporter's functions, drop dead nodes and metadata, in place."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    passes.InlinePass()(model)
    fold_constants(model)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    _name_by_layer(model)
    passes.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    if len(model.graph.outputs) == 1 and not any(v.name == "output" for v in model.graph.inputs):
        model.graph.outputs[0].name = "output"
    _name_batch(model)
    return model


def _name_by_layer(model: onnx_ir.Model) -> None:
    """Call a node after the module that it came from, where it is the only linear or normalisation node of that module."""
    nodes: dict[str, list[onnx_ir.Node]] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if (
            len(scopes) > 1
            and scopes[-2]
            and node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"}
        ):
            nodes.setdefault(scopes[-2], []).append(node)
    for path, found in nodes.items():
        if len(found) == 1:
            found[0].name = path


def _name_batch(model: onnx_ir.Model) -> None:
    """Call the one symbol on axis 0 of the inputs "batch" wherever it stands; the exporter numbers its symbols."""
    import onnx_ir as ir

    symbols = {
        str(v.shape[0])
        for v in model.graph.inputs
        if v.shape is not None and len(v.shape) and not isinstance(v.shape[0], int)
    }
    if len(symbols) != 1:
        return
    symbol = symbols.pop()
    values = [v for node in model.graph for v in node.outputs]
    for value in (*model.graph.inputs, *values):
        if value.shape is not None:
            value.shape = ir.Shape([ir.SymbolicDim("batch") if str(d) == symbol else d for d in value.shape])


def _batch_axes(leaves: Sequence[Any], size: int) -> list[dict[int, Any] | None]:
    """Axis 0 of every tensor that has the batch's size there."""
    batch = torch.export.Dim("batch")
    return [{0: batch} if isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == size else None for x in leaves]


def _axes_of_any_size(
    leaves: Sequence[Any], axes: Sequence[Sequence[int]], dynamic_batch: bool
) -> list[dict[int, Any] | None]:
    """The given axes of every leaf; torch.export raises where it would fix one of them."""
    return [
        {axis: torch.export.Dim.DYNAMIC for axis in own if axis or dynamic_batch} or None
        for _, own in zip(leaves, axes, strict=True)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter talks on stdout and stderr, in logs and in warnings; what matters is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
