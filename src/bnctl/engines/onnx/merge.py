"""Carry out merges on an ONNX model: one operator takes its parallel branches in, and they leave the sum."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnctl.engines.onnx.editor import Editor
from bnctl.engines.onnx.lift import Lifted
from bnctl.graph.affine import Array
from bnctl.graph.graph import Node, Slot
from bnctl.plan.merge import Merge, changed_values, merged_parameters, whole_sum


def apply_merges(lifted: Lifted, merges: tuple[Merge, ...]) -> ir.Model:
    """A new model with the merges carried out. What no longer has a reader is removed; equal values keep their names.

    Raises:
        OverflowInFoldError: a merged parameter does not fit its type.
    """
    editor = Editor(lifted.model)
    for merge in merges:
        _write(merge, lifted, editor)
    stands_for = _drop(merges, lifted, editor)
    graph = lifted.graph
    for merge in merges:
        whole = whole_sum(merge, graph).outputs[0]
        made_by = whole
        while made_by in stands_for:
            made_by = stands_for[made_by]
        for value in changed_values(merge, graph) - stands_for.keys():
            name = graph.values[value].name
            new = graph.values[whole].name if value == made_by else editor.fresh(f"{name}_merged")
            editor.rename(editor.value(name), new)
    return editor.model


def _write(merge: Merge, lifted: Lifted, editor: Editor) -> None:
    def stored(slot: Slot | None) -> Array | None:
        place = None if slot is None else lifted.places[slot.key]
        array = None if place is None else lifted.constants.array(place.value)
        if array is None or place is None:
            return None
        return np.asarray(array, np.float64).reshape(-1 if place.behind else array.shape)

    def read(node: Node) -> tuple[Array, Array | None]:
        weight = stored(node.weight)
        assert weight is not None
        return weight, stored(node.bias)

    weight, bias = merged_parameters(merge, read)
    into = merge.into
    assert into.weight is not None and into.bias is not None
    for native in lifted.natives[into.id][:-1]:  # a product to which the bias is still to be added
        product = editor.twin(native).outputs[0]
        editor.rename(product, editor.fresh(f"{product.name}_merged"))
    place, bias_place = lifted.places[into.weight.key], lifted.places[into.bias.key]
    array = lifted.constants.array(place.value)
    assert array is not None
    dtype = ir.DataType.from_numpy(array.dtype)
    editor.write(into.layer, place, weight, dtype)
    if into.bias.shape is not None or np.any(bias):
        editor.write(into.layer, bias_place, bias, dtype)
        if into.bias.shape is None and bias_place.node.op_type == "Gemm":  # without a C, beta had no meaning
            editor.twin(bias_place.node).attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    if merge.grows and merge.window is not None:
        attributes = editor.twin(place.node).attributes
        attributes.pop("auto_pad", None)
        attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", merge.kernel)
        attributes["dilations"] = ir.AttrInt64s("dilations", merge.window.dilation)
        attributes["pads"] = ir.AttrInt64s("pads", (*merge.window.before, *merge.window.after))


def _drop(merges: tuple[Merge, ...], lifted: Lifted, editor: Editor) -> dict[int, int]:
    """Leave the terms out of their sums; the values of sums that vanish, and what stands for each."""
    gone: dict[int, set[int]] = {}
    for term in (term for merge in merges for term in merge.terms):
        gone.setdefault(term.reader[0].id, set()).add(term.reader[1])
    stands_for: dict[int, int] = {}
    for number, indices in gone.items():
        node = lifted.graph.by_id[number]
        native = editor.twin(lifted.natives[number][0])
        assert len(native.inputs) == len(node.inputs)
        dropped = [native.inputs[i] for i in indices]
        left = [i for i in range(len(node.inputs)) if i not in indices]
        if len(left) == 1:
            stands_for[node.outputs[0]] = node.inputs[left[0]]
            editor.bypass(native, left[0])
            continue
        for new, old in enumerate(left):
            native.replace_input_with(new, native.inputs[old])
        native.resize_inputs(len(left))
        for value in dropped:
            editor.prune(value)
    return stands_for
