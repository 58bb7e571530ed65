"""A part of a model as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from bnctl.engines.onnx.shapes import IR_VERSION_WITH_DEFAULTS


def extracted(model: ir.Model, given: Mapping[ir.Value, ir.TypeProtocol], wanted: Sequence[ir.Value]) -> ir.Model:
    """What of the main graph computes some values from others; weights are shared.

    Args:
        model: not changed.
        given: values that become inputs, where they are read, and their types.
        wanted: values that become outputs, none of them given.
    """
    graph = ir.convenience.extract(model.graph, list(given), list(wanted))
    types = {str(value.name): type_ for value, type_ in given.items()}
    for value in tuple(graph.inputs):
        if value.uses():
            value.type, value.shape = types[str(value.name)], None  # sizes may be stale
        else:
            graph.inputs.remove(value)
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=max(model.ir_version, IR_VERSION_WITH_DEFAULTS), functions=functions)
