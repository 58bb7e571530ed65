"""Carry out a fold plan on a module tree, in place. The caller works on a copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bnctl.engines.torch.edits import Edit as Structural
from bnctl.engines.torch.edits import apply_edits, removal_edit
from bnctl.engines.torch.lift import Lifted, stored, to_numpy
from bnctl.engines.torch.removal import Bypass, Removal, Splice
from bnctl.graph.affine import Array
from bnctl.graph.graph import Node, Slot
from bnctl.graph.ops import LinearOp
from bnctl.plan.fold import FoldPlan
from bnctl.plan.parameters import check_range, new_parameters


def apply_fold(model: nn.Module, lifted: Lifted, plan: FoldPlan) -> list[Structural]:
    """Write the folded parameters and take the spent layers out.

    Parameters keep their dtype, device and ``requires_grad``; they are computed in float64 and cast once.

    Returns:
        The structural edits, for a bundle.

    Raises:
        OverflowInFoldError: a folded parameter does not fit its dtype. The model is then half edited: drop it.
    """
    bakes = [
        lifted.bakes[path]
        for path in dict.fromkeys(_owner(edit.weight.key) for edit in plan.edits)
        if path in lifted.bakes
    ]
    computed = {f"{bake.path}.{name}" for bake in bakes for name in ("weight", "bias")}
    own = [slot.key for slot in plan.untied if slot.key not in computed]
    edits: list[Structural] = [{"edit": "untie", "parameter": key} for key in own]
    edits += [{"edit": "tie", "parameter": key, "with": other} for key, other in plan.shared.items() if other in own]
    edits += [bake.edit() for bake in bakes]
    edits += [
        room_edit(edit.node, lifted)
        for edit in plan.edits
        if edit.node.bias is not None and edit.node.bias.shape is None
    ]
    apply_edits(model, edits)
    for bake in bakes:
        bake.fill(model)
    shared = {key: stored(model.get_parameter(key)) for key in set(plan.shared.values())}
    for edit in plan.edits:
        bias_slot, leader = edit.node.bias, plan.shared.get(edit.weight.key)
        bias = to_numpy(model.get_parameter(bias_slot.key)) if bias_slot is not None else None
        weight = stored(model.get_parameter(edit.weight.key)) if leader is None else shared[leader]
        new_weight, new_bias = new_parameters(edit, weight, bias)
        if edit.takes_ones:
            apply_edits(model, [{"edit": "ones", "module": edit.node.layer}])
            edits.append({"edit": "ones", "module": edit.node.layer})
        if leader is None and (edit.scales or edit.takes_ones):
            write(model, edit.weight, new_weight, edit.node.layer)
        if bias_slot is not None and edit.shifts and bias_slot.key not in plan.shared:
            write(model, bias_slot, new_bias, edit.node.layer)
    spent = [lifted.removals[layer] for layer in dict.fromkeys(node.layer for node in plan.removed)]
    removals = [removal_edit(removal) for removal in spent if isinstance(removal, Removal)]
    filled = [edit.node.bias.key for edit in plan.edits if edit.node.bias is not None]
    removals += code_edits(lifted, filled, [part for part in spent if not isinstance(part, Removal)])
    apply_edits(model, removals)
    return edits + removals


def room_edit(node: Node, lifted: Lifted) -> Structural:
    """Fills the empty bias of a layer, or of an operator in a module's code."""
    assert node.bias is not None and node.weight is not None and isinstance(node.op, LinearOp)
    path, _, name = node.bias.key.rpartition(".")
    if node.bias.key not in lifted.rooms:
        return {"edit": "bias", "module": path}
    size = node.op.layout.channels(node.weight.shape or ())[1]
    return {"edit": "parameter", "module": path, "name": name, "size": size, "like": node.weight.key}


def code_edits(lifted: Lifted, filled: Iterable[str], spent: Iterable[Splice | Bypass]) -> list[Structural]:
    """What becomes of the code of modules.

    Args:
        lifted: the model.
        filled: names of parameters that fill a place for a bias in such code.
        spent: what is taken out of it.
    """
    biases: dict[str, dict[int, tuple[str, int | None]]] = {}
    for room, key in ((lifted.rooms[key], key) for key in filled if key in lifted.rooms):
        biases.setdefault(room.path, {})[room.step] = (key.rpartition(".")[2], room.behind)
    programs = {path: lifted.programs[path].biased(found) for path, found in biases.items()}
    aliases: dict[str, dict[int, int]] = {}
    nodes: dict[str, dict[str, str]] = {}
    for part in spent:
        if isinstance(part, Bypass):
            nodes.setdefault(part.path, {}).update(part.aliases)
        else:
            aliases.setdefault(part.path, {}).update(part.aliases)
    for path, values in aliases.items():
        programs[path] = programs.get(path, lifted.programs[path]).without(values)
    return [
        *({"edit": "replay", "module": path, "program": p.to_json()} for path, p in programs.items()),
        *({"edit": "bypass", "module": path, "nodes": names} for path, names in nodes.items()),
    ]


def write(model: nn.Module, slot: Slot, array: Array, layer: str) -> None:
    """Give a stored parameter new values, cast once.

    Raises:
        OverflowInFoldError: they do not fit its dtype.
    """
    parameter = model.get_parameter(slot.key)
    check_range(layer, array, torch.finfo(parameter.dtype).max)
    new = torch.from_numpy(array).reshape(parameter.shape)
    # Into fresh memory: another parameter may be a view of the old.
    fits = (new.dtype, new.device, new.stride()) == (parameter.dtype, parameter.device, parameter.stride())
    parameter.data = new if fits else torch.empty_like(parameter.data).copy_(new)


def _owner(key: str) -> str:
    return key.rpartition(".")[0]
