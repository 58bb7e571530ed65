"""Overridable initializers made constants."""

from __future__ import annotations

import onnx_ir as ir

from bnctl.engines.onnx.shapes import IR_VERSION_WITH_DEFAULTS


def frozen(model: ir.Model) -> ir.Model:
    """A structural copy in which every initializer is a constant: those that were inputs of the graph with a default no longer are.

    Before IR version 4 every initializer had to be listed as an input and none could be overridden; such a model stays as it is.
    """
    clone = model.clone()
    if clone.ir_version >= IR_VERSION_WITH_DEFAULTS:
        for value in [v for v in clone.graph.inputs if v.is_initializer()]:
            clone.graph.inputs.remove(value)
    return clone
