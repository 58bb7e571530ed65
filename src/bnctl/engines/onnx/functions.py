"""Local functions: those that hold something to fold are put in place of their calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import onnx_ir as ir
from onnx_ir.passes import InvariantError
from onnx_ir.passes.common import InlinePass

from bnctl.engines.onnx.scopes import opsets, within

Key = tuple[str, str, str]
_ORIGIN = "bnctl.function"


def with_functions_inlined(model: ir.Model, touched: Callable[[ir.Model], Iterable[ir.Node]]) -> ir.Model:
    """A copy of the model in which no call leads to a function that has a BatchNormalization, or that surgery would reach into; others stay functions.

    Which ones surgery reaches into shows when all of them are inlined.

    Args:
        model: not changed.
        touched: the nodes that surgery on a model would change or move something through.
    """
    able = {key for key, function in model.functions.items() if _can_be_inlined(function, model)}
    flat = _inlined(model, able)
    if flat is None:
        return model
    wanted = {key for key in able if any(_is_batch_norm(node) for node in _nodes(model.functions[key].graph))}
    wanted |= {node.meta[_ORIGIN] for node in touched(flat) if _ORIGIN in node.meta}
    wanted = _with_callers(model, wanted) & able
    return _inlined(model, wanted) or model if wanted else model


def _inlined(model: ir.Model, keys: Collection[Key]) -> ir.Model | None:
    """A copy with some functions inlined, whose nodes know where they come from; None where the inliner cannot."""
    clone = model.clone()
    for key, function in clone.functions.items():
        for node in _nodes(function.graph):
            node.meta[_ORIGIN] = key
    try:
        InlinePass(lambda function: function.identifier() in keys)(clone)
    except (InvariantError, ValueError, RuntimeError):
        return None  # a graph is an attribute of a call, or functions call each other in a ring
    return clone


def _can_be_inlined(function: ir.Function, model: ir.Model) -> bool:
    """It means the same operators as the model, and none of its outputs is an input or another output: names of values would be lost."""
    imports = opsets(model.opset_imports)
    same = all(imports.get(d, version) == version for d, version in opsets(function.opset_imports).items())
    outputs = list(function.outputs)
    return same and len(set(outputs)) == len(outputs) and not set(outputs) & set(function.inputs)


def _with_callers(model: ir.Model, keys: set[Key]) -> set[Key]:
    found = set(keys)
    while True:
        callers = {
            key
            for key, function in model.functions.items()
            if any(node.op_identifier() in found for node in _nodes(function.graph))
        }
        if callers <= found:
            return found
        found |= callers


def _is_batch_norm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and node.domain == ""


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for inner in within(graph):
        yield from inner
