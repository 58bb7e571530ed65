"""Carry out merges on a module tree, in place: one convolution takes its parallel branches in, and they leave the code around them."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnctl.engines.torch.edits import Edit, apply_edits
from bnctl.engines.torch.lift import Lifted, to_numpy
from bnctl.engines.torch.removal import Removal
from bnctl.engines.torch.surgery import code_edits, room_edit, write
from bnctl.graph.affine import Array
from bnctl.graph.graph import Node, Slot
from bnctl.graph.ops import Conv
from bnctl.graph.window import Window
from bnctl.plan.merge import Limits, Merge, merged_parameters

_STOCK = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def limits(model: nn.Module, lifted: Lifted) -> Limits:
    """What can be done to this model.

    Kernels grow in torch's own convolutions, with as many zeros before as behind; an operand of a sum is left out where the code around it can be replayed.
    """

    def resizable(node: Node, window: Window) -> bool:
        return is_stock(model, node) and window.before == window.after

    def droppable(node: Node) -> bool:
        return lifted.drop(node, 0) is not None and lifted.drop(node, 1) is not None

    return Limits(resizable, droppable)


def is_stock(model: nn.Module, node: Node) -> bool:
    """Whether a node is one of torch's own convolution layers, which reads its own weight and pads with zeros."""
    if not isinstance(node.op, Conv) or node.obstacle is not None:
        return False
    layer: Any = model.get_submodule(node.layer)
    own = node.weight is not None and node.weight.key == f"{node.layer}.weight"
    return own and type(layer).forward in _STOCK and layer.padding_mode == "zeros"


def _idle(model: nn.Module, lifted: Lifted, merges: tuple[Merge, ...]) -> list[str]:
    """Paths of the modules of which every call is merged into another layer: they and their parameters go."""
    taken = {term.node.id for merge in merges for term in merge.terms if term.node is not None}
    names = dict.fromkeys(name for merge in merges for name in merge.names)
    paths = {path for path, _ in model.named_modules()}
    calls = {name: [node.id for node in lifted.graph.nodes if node.layer == name] for name in names}
    ways = {name: lifted.removals.get(name, Removal(name, ())) for name in names}
    return [n for n in names if n in paths and taken.issuperset(calls[n]) and ways[n] == Removal(n, ())]


def apply_merges(model: nn.Module, lifted: Lifted, merges: tuple[Merge, ...], *, keep: bool = False) -> list[Edit]:
    """Write the merged parameters and drop what was merged; ``keep``: from the code, but not from the module tree.

    Returns:
        The structural edits, for a bundle.

    Raises:
        OverflowInFoldError: a merged parameter does not fit its dtype. The model is then half edited: drop it.
    """

    def stored(slot: Slot | None) -> Array | None:
        if slot is None or slot.shape is None:
            return None
        path, _, name = slot.key.rpartition(".")
        bake = lifted.bakes.get(path)
        return to_numpy(model.get_parameter(slot.key) if bake is None else getattr(bake, name))

    def read(node: Node) -> tuple[Array, Array | None]:
        weight = stored(node.weight)
        assert weight is not None
        return weight, stored(node.bias)

    parameters = [merged_parameters(merge, read) for merge in merges]
    edits: list[Edit] = []
    for merge in merges:
        bake = lifted.bakes.get(merge.into.layer)
        edits += [bake.edit()] if bake is not None else []
        if merge.into.bias is not None and merge.into.bias.shape is None:
            edits.append(room_edit(merge.into, lifted))
        if merge.grows and merge.window is not None:
            sizes = {"kernel": merge.kernel, "padding": merge.window.before, "dilation": merge.window.dilation}
            edits.append({"edit": "kernel", "module": merge.into.layer} | {k: list(v) for k, v in sizes.items()})
    filled = [merge.into.bias.key for merge in merges if merge.into.bias is not None]
    dropped = [lifted.drop(*term.reader) for merge in merges for term in merge.terms]
    edits += code_edits(lifted, filled, [part for part in dropped if part is not None])
    edits += [{"edit": "remove", "module": path, "tail": []} for path in ([] if keep else _idle(model, lifted, merges))]
    apply_edits(model, edits)
    for merge, arrays in zip(merges, parameters, strict=True):
        for slot, array in zip((merge.into.weight, merge.into.bias), arrays, strict=True):
            assert slot is not None
            write(model, slot, array, merge.into.layer)
    return edits
