"""Give a graph of functional calls its layers back.

``torch.export`` writes a BatchNorm as ``aten.batch_norm(x, getattr(self, "1").weight, ...)``: the layer ``1`` is a bare holder of parameters. Here the
holder becomes an ``nn.BatchNorm2d`` again and the call a call of that module, so that an exported graph is edited, calibrated and recalibrated like any other
model. Names in the state dict stay. A call that does not fit a layer (computed weights, parameters of several holders) stays functional.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def keep_hooks(graph_module: fx.GraphModule, twin: fx.GraphModule, memo: dict[int, Any]) -> None:
    """Give a copy of a graph module the hooks of its forward, which are lost otherwise. What torch.export itself attaches is left: it is for attributes that
    are lost, too.
    """
    for name in _HOOKS:
        kept = {
            key: copy.deepcopy(hook, memo)
            for key, hook in getattr(graph_module, name).items()
            if not str(getattr(hook, "__module__", "")).startswith("torch.")
        }
        getattr(twin, name).update(kept)


def is_exported(graph_module: fx.GraphModule) -> bool:
    """Whether torch.export made the graph: layers are functional calls in it, and it refuses ``train()`` and ``eval()``."""
    return any(
        node.target == "_guards_fn" or (node.op == "call_function" and node.target in _BUILD)
        for node in graph_module.graph.nodes
    )


def give_layers_back(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph module in which convolutions, linear layers and BatchNorms are modules again; the argument is used up.

    The guards on input shapes that torch.export adds stay: a graph that was made for one batch size goes on refusing others.
    """
    graph, exported = graph_module.graph, is_exported(graph_module)
    modes = {name: module.training for name, module in graph_module.named_modules()}
    built: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        build = _BUILD.get(node.target) if node.op == "call_function" else None
        if build is None:
            continue
        parameters = [arg.target if isinstance(arg, fx.Node) and arg.op == "get_attr" else arg for arg in node.args[1:]]
        layer = _layer(graph_module, parameters, build, node)
        if layer is None:
            continue
        path, module = layer
        known = built.get(path)
        if known is not None and repr(known) != repr(module):
            continue
        if known is None:
            built[path] = module
            graph_module.set_submodule(path, module)
        with graph.inserting_before(node):
            call = graph.call_module(path, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    plain = fx.GraphModule(graph_module, graph, type(graph_module).__name__)
    keep_hooks(graph_module, plain, {id(graph_module): plain})
    for name, module in plain.named_modules():
        module.training = modes.get(name, False) and not exported
    return plain


_Build = Callable[[dict[str, torch.Tensor | None], list[Any], int], nn.Module | None]


def _layer(
    graph_module: fx.GraphModule, arguments: list[Any], build: _Build, node: fx.Node
) -> tuple[str, nn.Module] | None:
    """The module that a call stands for, and its path: all its parameters must hang below one holder, under a layer's usual names."""
    weight = arguments[0]
    if not isinstance(weight, str) or not weight.endswith(".weight"):
        return None
    path = weight.rpartition(".")[0]
    names = ["weight", "bias", "running_mean", "running_var"][: 4 if "batch_norm" in str(node.target) else 2]
    tensors: dict[str, torch.Tensor | None] = {}
    for name, argument in zip(names, arguments, strict=False):
        if argument is not None and argument != f"{path}.{name}":
            return None
        tensors[name] = None if argument is None else _tensor(graph_module, argument)
    holder = graph_module.get_submodule(path)
    value = node.meta.get("val")
    module = build(tensors, arguments[len(names) :], getattr(value, "ndim", 0))
    if module is None or dict(holder.named_children()):
        return None
    for name, tensor in tensors.items():
        setattr(
            module,
            name,
            tensor if isinstance(tensor, nn.Parameter | None) or name.startswith("running") else nn.Parameter(tensor),
        )
    own = dict(holder.named_parameters(recurse=False)) | dict(holder.named_buffers(recurse=False))
    if set(own) - set(dict(module.named_parameters()) | dict(module.named_buffers())):
        return None
    for name in set(own) - set(tensors):  # num_batches_tracked
        setattr(module, name, own[name])
    for name in set(dict(module.named_buffers())) - set(own):  # which a strict export leaves out
        setattr(module, name, None)
    return path, module


def _tensor(graph_module: fx.GraphModule, target: str) -> torch.Tensor:
    owner, _, name = target.rpartition(".")
    found = getattr(graph_module.get_submodule(owner), name)
    assert isinstance(found, torch.Tensor)
    return found


def _conv(tensors: dict[str, torch.Tensor | None], rest: list[Any], rank: int) -> nn.Module | None:
    weight = tensors["weight"]
    assert weight is not None
    stride, padding, dilation, groups = rest + [1, 0, 1, 1][len(rest) :]
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    return kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride=_whole(stride),
        padding=_whole(padding),
        dilation=_whole(dilation),
        groups=groups,
        bias=False,
        device="meta",
    )


def _whole(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) > 1 else value[0]
    return value


def _linear(tensors: dict[str, torch.Tensor | None], rest: list[Any], rank: int) -> nn.Module | None:
    weight = tensors["weight"]
    assert weight is not None
    return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta") if weight.ndim == 2 else None


def _batch_norm(tensors: dict[str, torch.Tensor | None], rest: list[Any], rank: int) -> nn.Module | None:
    training, momentum, eps = rest[:3]
    mean = tensors["running_mean"]
    if training or mean is None or rank < 2:
        return None
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
    return kind(mean.shape[0], eps=eps, momentum=momentum, affine=tensors["weight"] is not None, device="meta")


_BUILD: dict[Any, _Build] = {
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
}
