"""Tensors that a module holds under several names (tied weights)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every name it has, buffers that are not in the state dict included."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def find_ties(module: nn.Module) -> dict[str, str]:
    """Map every further name of a tied tensor of the state dict to its first name."""
    tensors = named_tensors(module)
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name in module.state_dict():
        if name in tensors:  # extra state is in the state dict and no tensor
            original = first.setdefault(id(tensors[name]), name)
            if original != name:
                ties[name] = original
    return ties


def restore_ties(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Make each name in `ties` hold the very tensor that the name it maps to holds."""
    tensors = named_tensors(module)
    for name, original in ties.items():
        set_tensor(module, name, tensors[original])


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor  # type: ignore[assignment]
