"""Carry out a fold plan on a module tree, in place. The caller works on a copy."""

from __future__ import annotations

import torch
from torch import nn

from bnctl.engines.torch.edits import Edit as Structural
from bnctl.engines.torch.edits import apply_edits, removal_edit
from bnctl.engines.torch.lift import Lifted, to_numpy
from bnctl.graph.affine import Array
from bnctl.graph.graph import Slot
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
    edits: list[Structural] = [{"edit": "untie", "parameter": slot.key} for slot in plan.untied]
    filled = [edit.node.bias.key for edit in plan.edits if edit.node.bias is not None and edit.node.bias.shape is None]
    edits += [{"edit": "bias", "module": key.rpartition(".")[0]} for key in filled]
    apply_edits(model, edits)
    for edit in plan.edits:
        bias_slot = edit.node.bias
        bias = to_numpy(model.get_parameter(bias_slot.key)) if bias_slot is not None else None
        new_weight, new_bias = new_parameters(edit, to_numpy(model.get_parameter(edit.weight.key)), bias)
        _write(model, edit.weight, new_weight, edit.node.layer)
        if bias_slot is not None:
            _write(model, bias_slot, new_bias, edit.node.layer)
    spent = dict.fromkeys(node.layer for node in plan.removed)
    removals = [removal_edit(lifted.removals[layer]) for layer in spent]
    apply_edits(model, removals)
    return edits + removals


def _write(model: nn.Module, slot: Slot, array: Array, layer: str) -> None:
    parameter = model.get_parameter(slot.key)
    check_range(layer, array, torch.finfo(parameter.dtype).max)
    # Into fresh memory: another parameter may be a view of the old.
    parameter.data = torch.empty_like(parameter.data).copy_(torch.from_numpy(array).reshape(parameter.shape))
