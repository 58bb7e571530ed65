"""A fold plan carried out on an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnctl.engines.onnx.editor import Editor
from bnctl.engines.onnx.lift import Lifted
from bnctl.engines.onnx.translated import Place
from bnctl.graph.graph import Slot
from bnctl.plan.draft import Edit
from bnctl.plan.fold import FoldPlan
from bnctl.plan.parameters import new_parameters


def apply_fold(lifted: Lifted, plan: FoldPlan) -> ir.Model:
    """A new model with the plan carried out.

    Parameters are computed in float64 and cast once, to the type in which they were stored. Names of inputs, outputs and of all values that stay the same
    stay; the value that becomes equal to the output of a folded node takes its name, and any other value that changes gets a new one. Initializers and constant
    nodes that only folded nodes read are removed.

    Raises:
        OverflowInFoldError: new parameters do not fit their type.
    """
    editor = Editor(lifted.model)
    for edit in plan.edits:
        _carry_out(edit, lifted, editor, plan.shared)
    for node in plan.removed:
        native = lifted.natives[node.id][0]
        names = [None if v is None else v.name for v in native.inputs]
        editor.bypass(editor.twin(native), names.index(lifted.graph.values[node.inputs[0]].name))
    _rename(lifted, plan, editor)
    return editor.model


def _carry_out(edit: Edit, lifted: Lifted, editor: Editor, shared: Mapping[str, str]) -> None:
    def write(slot: Slot | None, place: Place, array: NDArray[np.float64], dtype: ir.DataType) -> None:
        leader = shared.get(slot.key) if slot is not None else None
        if leader is None:
            editor.write(node.layer, place, array, dtype)
        else:
            editor.share(place, lifted.places[leader])

    node = edit.node
    assert node.weight is not None
    weight, place = _stored(lifted, node.weight)
    bias, bias_place = (None, None) if node.bias is None else _stored(lifted, node.bias)
    assert weight is not None
    old_bias = None if bias is None else np.asarray(bias, np.float64)
    if old_bias is not None and bias_place is not None and bias_place.behind:
        old_bias = old_bias.reshape(-1)
    new, new_bias = new_parameters(edit, weight, old_bias)
    for native in lifted.natives[node.id][:-1]:  # a product to which the bias is still to be added
        product = editor.twin(native).outputs[0]
        editor.rename(product, editor.fresh(f"{product.name}_folded"))
    if edit.takes_ones:
        editor.append_ones(place.node, weight.ndim, ir.DataType.from_numpy(weight.dtype))
    if edit.scales or edit.takes_ones:
        write(node.weight, place, new, ir.DataType.from_numpy(weight.dtype))
    if bias_place is None or np.array_equal(new_bias, np.zeros_like(new_bias) if old_bias is None else old_bias):
        return
    write(node.bias, bias_place, new_bias, ir.DataType.from_numpy(weight.dtype if bias is None else bias.dtype))
    if bias is None and bias_place.node.op_type == "Gemm":  # without a C, beta had no meaning
        editor.twin(bias_place.node).attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def _stored(lifted: Lifted, slot: Slot) -> tuple[NDArray[Any] | None, Place]:
    place = lifted.places[slot.key]
    return lifted.constants.array(place.value), place


def _rename(lifted: Lifted, plan: FoldPlan, editor: Editor) -> None:
    """Equal names for equal values, before and after: that is what a comparison layer by layer rests on."""
    values = lifted.graph.values
    for number, old in plan.meaning.items():
        value = editor.value(values[number].name)
        editor.rename(value, editor.fresh(f"{values[number].name}_folded") if old is None else values[old].name)
