"""A site reads other values as its statistics."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from bnctl.engines.onnx.editor import Editor
from bnctl.engines.onnx.recalibration.sites import Arrays, Role, Site


def rewire(editor: Editor, site: Site, new: Mapping[Role, ir.Value]) -> None:
    """Let a site read these values as its statistics, and nobody else: what constants compute from them is computed anew for this site.

    Constants that nobody reads any more are removed.
    """
    computed: dict[ir.Value, ir.Value] = {}
    for operand in site.operands:
        place = operand.place
        assert place.index is not None
        node, original = editor.twin(place.node), place.value
        old = node.inputs[place.index]
        assert original is not None and old is not None
        leaves = {leaf: new[role] for leaf, role in operand.leaves.items()}
        node.replace_input_with(place.index, _rebuilt(editor, node, original, old, leaves, computed))
        editor.prune(old)


def store(editor: Editor, site: Site, arrays: Arrays) -> None:
    """Let a site read these arrays as its statistics: initializers of its own, under the old names where nobody else has them."""
    new: dict[Role, ir.Value] = {}
    for role, array in arrays.items():
        new[role] = editor.initializer(site.name, f"{site.name}.{role}", array, ir.DataType.from_numpy(array.dtype))
    rewire(editor, site, new)
    for role, value in new.items():
        editor.rename(value, editor.fresh(site.stored[role].name))


def _rebuilt(
    editor: Editor,
    reader: ir.Node,
    original: ir.Value,
    twin: ir.Value,
    leaves: Mapping[ir.Value, ir.Value],
    computed: dict[ir.Value, ir.Value],
) -> ir.Value:
    """A constant of the original with other leaves, in the copy and before its reader; its twin where it has none of them."""
    if original in leaves or original in computed:
        return leaves.get(original) or computed[original]
    producer = original.producer()
    if producer is None:
        return twin
    of_twin = editor.twin(producer)
    inputs = [
        None if one is None or two is None else _rebuilt(editor, reader, one, two, leaves, computed)
        for one, two in zip(producer.inputs, of_twin.inputs, strict=True)
    ]
    if all(new is old for new, old in zip(inputs, of_twin.inputs, strict=True)):
        return twin
    node = ir.node(
        of_twin.op_type,
        inputs,
        attributes=dict(of_twin.attributes),
        domain=of_twin.domain,
        num_outputs=len(of_twin.outputs),
    )  # without a name, which must be its own
    for output, old in zip(node.outputs, of_twin.outputs, strict=True):
        output.name, output.type, output.shape = editor.fresh(str(old.name)), old.type, old.shape
    around = reader.graph
    assert isinstance(around, ir.Graph)
    around.insert_before(reader, node)
    computed.update(zip(producer.outputs, node.outputs, strict=True))
    return computed[original]
