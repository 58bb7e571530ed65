"""Copies of models."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from bnctl.engines.torch.nested import tensors_in
from bnctl.engines.torch.relayer import give_layers_back, is_exported, keep_hooks
from bnctl.errors import ModelError


def workable(module: nn.Module, name: str) -> nn.Module:
    """A copy for surgery: :func:`copied`, and an exported graph gets its layers back.

    Raises:
        ModelError: the module cannot be copied.
    """
    return editable(copied(module, name))


def editable(module: nn.Module) -> nn.Module:
    """The module as surgery works on it: a graph of torch.export or torch.fx, and parts that torch.export made, get their layers back. The argument is used
    up.
    """
    if isinstance(module, fx.GraphModule):
        return module if "forward" in vars(module) else give_layers_back(module)
    graphs = [part for part in module.modules() if isinstance(part, fx.GraphModule) and is_exported(part)]
    with_layers = {id(graph): give_layers_back(graph) for graph in graphs if "forward" not in vars(graph)}
    for graph in graphs:
        if id(graph) in with_layers:
            graph.forward = with_layers[id(graph)].forward  # for code that calls it by another way than the module tree
    for part in list(module.modules()):
        for name, child in part._modules.items():
            if id(child) in with_layers:
                part._modules[name] = with_layers[id(child)]
    return module


def copied(module: nn.Module, name: str, shared: Iterable[torch.Tensor] = ()) -> nn.Module:
    """A deep copy, but for the tensors in `shared`, which both have.

    Args:
        module: left alone.
        name: what to call it in errors.
        shared: tensors that are taken over.

    Raises:
        ModelError: the module cannot be copied.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch's own, on copying the tree specs of an exported graph
            memo = _copied_by_hand(module) | {id(t): t for t in shared}
            twin: nn.Module = copy.deepcopy(module, memo)
            for part in module.modules():
                if isinstance(part, fx.GraphModule):
                    keep_hooks(part, memo[id(part)], memo)
                    if "forward" in vars(part):
                        memo[id(part)].forward = copy.deepcopy(vars(part)["forward"], memo)
    except Exception as error:
        raise ModelError(
            f"{name} cannot be copied: {type(error).__name__}: {error}",
            hint="take out of its attributes what Python cannot copy (locks, files, generators)",
        ) from error
    return twin


def _copied_by_hand(module: nn.Module) -> dict[int, Any]:
    """The memo for a deep copy, with what a walk over the modules' attributes copies better.

    Tensors with a history (a weight-normed weight, a stored feature), which torch refuses to copy, and empty containers: a module has a dozen of these for its
    hooks, and without them the copy of a network of many layers takes half the time.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            kind = type(value)
            if kind in _CONTAINERS and not value:
                memo[id(value)] = kind()
            elif kind not in _ATOMS and name not in _REGISTERED:
                memo |= {id(t): t.detach().clone() for t in tensors_in(value) if not t.is_leaf}
    return memo


_CONTAINERS = {OrderedDict, dict, set, list}
_ATOMS = {bool, int, float, str, type(None)}
_REGISTERED = {"_modules", "_parameters"}
