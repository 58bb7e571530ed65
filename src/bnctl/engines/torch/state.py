"""What a pass may change in a module besides its parameters, and how it is put back."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = {list, dict, set, deque, OrderedDict, defaultdict, Counter}
_OF_EVERY_MODULE = set(vars(nn.Module()))


@contextmanager
def keeping_state(module: nn.Module) -> Iterator[None]:
    """Put the state of a module back afterwards, see :func:`snapshot`."""
    restore = snapshot(module)
    try:
        yield
    finally:
        restore()


def snapshot(module: nn.Module) -> Callable[[], None]:
    """Buffers and plain attributes as they are now, with what lists and dictionaries among these hold, to be put back by a call: a layer in training mode
    updates its statistics when it runs, and a module may count, cache or collect.
    """
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    attributes = [dict(vars(part)) for part in parts]
    registered = [(dict(part._parameters), dict(part._buffers)) for part in parts]
    values = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    own = (value for plain in attributes for name, value in plain.items() if name not in _OF_EVERY_MODULE)
    containers, tensors = _held(own)
    contents = [(container, container.copy()) for container in containers]
    others = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]

    def restore() -> None:
        for part, plain, (parameters, buffers) in zip(parts, attributes, registered, strict=True):
            vars(part).clear()
            vars(part).update(plain)
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
            for tensor, version, value in others:
                if tensor._version != version:
                    tensor.copy_(value)

    return restore


def _held(items: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """Python's own containers that can be written to, among the items and inside them, and the tensors there that can be."""
    containers: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}
    todo = list(items)
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            if not item.is_inference():
                tensors[id(item)] = item
        elif type(item) in _CONTAINERS and id(item) not in containers:
            containers[id(item)] = item
            todo.extend(item.values() if isinstance(item, dict) else item)
        elif type(item) is tuple:
            todo.extend(item)
    return list(containers.values()), list(tensors.values())
