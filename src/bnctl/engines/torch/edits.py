"""Structural edits of a module tree, as JSON: what a bundle records so that the user's own class can be rebuilt with them.

| edit | does |
|---|---|
| `{"edit": "remove", "module": "bn1", "tail": [...]}` | replaces the module by what is kept of it; nothing kept: an Identity |
| `{"edit": "bias", "module": "conv1"}` | gives a layer without bias a bias of zeros |
| `{"edit": "bake", "module": "conv1", "layer": "Conv2d", "args": {...}, "dtype": "float32"}` | a plain layer in place of one that computes its weight |
| `{"edit": "ones", "module": "conv1"}` | gives a convolution a further input channel of ones, and zeros in its weight |
| `{"edit": "parameter", "module": "block", "name": "bias_0", "size": 64, "like": "weight"}` | gives a module a parameter of zeros |
| `{"edit": "kernel", "module": "conv1", "kernel": [3, 3], "padding": [1, 1], "dilation": [1, 1]}` | gives a convolution another kernel size, and zeros in it |
| `{"edit": "replay", "module": "block", "program": {...}}` | lets a module run a list of steps in the place of its code |
| `{"edit": "bypass", "module": "", "nodes": {"mul_2": "conv2d"}}` | lets nodes of a graph of torch.export stand for others |
| `{"edit": "untie", "parameter": "conv2.weight"}` | gives a shared parameter a copy of its own |
| `{"edit": "tie", "parameter": "conv3.weight", "with": "conv2.weight"}` | lets a layer hold the parameter of another one |
| `{"edit": "insert", "module": "conv1", "norm": "BatchNorm2d", "features": 64, "eps": 1e-05}` | hangs a norm below a layer |

Values come from the state dict, never from an edit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from bnctl.engines.torch.bake import build
from bnctl.engines.torch.exported import let_stand_for
from bnctl.engines.torch.layers import (
    INSERTED,
    LastAxisBatchNorm,
    Pointwise,
    attach_norm,
    attach_ones,
    detach_norm,
    inserted_norm,
)
from bnctl.engines.torch.program import Program, Replay
from bnctl.engines.torch.removal import POINTWISE, Removal
from bnctl.errors import ModelError

Edit = dict[str, Any]

NORMS: dict[str, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm3d": nn.BatchNorm3d,
    "LastAxisBatchNorm": LastAxisBatchNorm,
}


def apply_edits(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> None:
    """Carry out edits in place, in order.

    Raises:
        ModelError: an edit is not of a known kind, or names a module that the model does not have.
    """
    tree = _Tree(model)
    for edit in edits:
        try:
            _APPLY[edit["edit"]](tree, edit)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"cannot apply the edit {dict(edit)}: {error}",
                hint="the model that the factory builds is not the one that was edited",
            ) from error


def removal_edit(removal: Removal) -> Edit:
    """The edit that takes out an affine layer."""
    tail = [
        {"child": s.child} if s.child is not None else {"op": s.op, "args": list(s.args[0]), "kwargs": dict(s.args[1])}
        for s in removal.tail
    ]
    return {"edit": "remove", "module": removal.path, "tail": tail}


class _Tree:
    """A module tree, and where each module hangs: at several places, perhaps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        self._note(model)

    def _note(self, top: nn.Module) -> None:
        for module in top.modules():
            for key, child in module._modules.items():
                if child is not None:
                    self.places.setdefault(child, []).append((module, key))

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in the place of another, wherever that hangs. Code that calls the old one by another way (a plain list, an object of its own) gets what
        the new one computes.
        """
        new.train(old.training)
        if not isinstance(old, torch.jit.ScriptModule):
            old.forward = new.forward
        self._note(new)
        for module, key in self.places.pop(old, ()):
            module._modules[key] = new
            self.places.setdefault(new, []).append((module, key))


def _remove(tree: _Tree, edit: Mapping[str, Any]) -> None:
    path = edit["module"]
    old = tree.model.get_submodule(path)
    parent_path, _, name = path.rpartition(".")
    parent = tree.model.get_submodule(parent_path)
    if name == INSERTED and inserted_norm(parent) is old:
        detach_norm(parent)
        return
    steps = OrderedDict((_step_name(step, i), _kept(old, step)) for i, step in enumerate(edit.get("tail", ())))
    new: nn.Module = nn.Sequential(steps) if steps else nn.Identity()
    tree.put(old, new)


def _step_name(step: Mapping[str, Any], position: int) -> str:
    return str(step["child"]) if "child" in step else f"op{position}"


def _kept(old: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    if "child" in step:
        return old.get_submodule(step["child"])
    if step["op"] not in POINTWISE:
        raise ValueError(f"{step['op']} is not an elementwise operator that bnctl keeps")
    return Pointwise(step["op"], tuple(step["args"]), step["kwargs"])


def _bias(tree: _Tree, edit: Mapping[str, Any]) -> None:
    layer = tree.model.get_submodule(edit["module"])
    weight = layer.get_parameter("weight")
    features: Any = layer.out_channels if hasattr(layer, "out_channels") else layer.out_features
    zeros = torch.zeros(int(features), dtype=weight.dtype, device=weight.device)
    layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))


def _untie(tree: _Tree, edit: Mapping[str, Any]) -> None:
    path, _, name = edit["parameter"].rpartition(".")
    owner = tree.model.get_submodule(path)
    old = owner.get_parameter(name)
    owner.register_parameter(name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))


def _tie(tree: _Tree, edit: Mapping[str, Any]) -> None:
    path, _, name = edit["parameter"].rpartition(".")
    tree.model.get_submodule(path).register_parameter(name, tree.model.get_parameter(edit["with"]))


def _insert(tree: _Tree, edit: Mapping[str, Any]) -> None:
    layer = tree.model.get_submodule(edit["module"])
    weight = layer.get_parameter("weight")
    norm = NORMS[edit["norm"]](int(edit["features"]), eps=float(edit["eps"]), momentum=edit.get("momentum", 0.1))
    attach_norm(layer, norm.to(device=weight.device, dtype=weight.dtype).train(layer.training))


def _bake(tree: _Tree, edit: Mapping[str, Any]) -> None:
    old = tree.model.get_submodule(edit["module"])
    device = next((t.device for t in (*old.parameters(), *old.buffers())), torch.device("cpu"))
    new = build(edit["layer"], edit["args"], getattr(torch, edit["dtype"]), device)
    learned = any(p.requires_grad for p in old.parameters())
    tree.put(old, new.requires_grad_(learned))


def _parameter(tree: _Tree, edit: Mapping[str, Any]) -> None:
    owner = tree.model.get_submodule(edit["module"])
    like = tree.model.get_parameter(edit["like"])
    zeros = torch.zeros(int(edit["size"]), dtype=like.dtype, device=like.device)
    owner.register_parameter(edit["name"], nn.Parameter(zeros, requires_grad=like.requires_grad))


def _kernel(tree: _Tree, edit: Mapping[str, Any]) -> None:
    layer: Any = tree.model.get_submodule(edit["module"])
    old = layer.get_parameter("weight")
    layer.kernel_size, layer.padding = tuple(edit["kernel"]), tuple(edit["padding"])
    layer.dilation = tuple(edit["dilation"])  # a kernel of size one may have had any
    layer._reversed_padding_repeated_twice = [n for n in reversed(layer.padding) for _ in range(2)]
    zeros = torch.zeros(*old.shape[:2], *layer.kernel_size, dtype=old.dtype, device=old.device)
    layer.weight = nn.Parameter(zeros, requires_grad=old.requires_grad)


def _ones(tree: _Tree, edit: Mapping[str, Any]) -> None:
    layer: Any = tree.model.get_submodule(edit["module"])
    old = layer.get_parameter("weight")
    layer.in_channels += 1
    zeros = torch.zeros(old.shape[0], old.shape[1] + 1, *old.shape[2:], dtype=old.dtype, device=old.device)
    layer.weight = nn.Parameter(zeros, requires_grad=old.requires_grad)
    attach_ones(layer)


def _replay(tree: _Tree, edit: Mapping[str, Any]) -> None:
    module = tree.model.get_submodule(edit["module"])
    module.forward = Replay(module, Program.from_json(edit["program"]))


def _bypass(tree: _Tree, edit: Mapping[str, Any]) -> None:
    module = tree.model.get_submodule(edit["module"])
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"{edit['module'] or 'the model'} is no graph")
    let_stand_for(module, edit["nodes"])


_APPLY = {
    "remove": _remove,
    "bias": _bias,
    "bake": _bake,
    "kernel": _kernel,
    "ones": _ones,
    "parameter": _parameter,
    "replay": _replay,
    "bypass": _bypass,
    "untie": _untie,
    "tie": _tie,
    "insert": _insert,
}
