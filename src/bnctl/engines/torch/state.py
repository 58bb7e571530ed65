"""What a pass may change in a module besides its parameters, and how it is put back."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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
    registered: list[list[tuple[Any, Any]]] = [
        [(held, dict(held)) for held in (part._parameters, part._buffers, part._modules)] for part in parts
    ]
    own = (value for plain in attributes for name, value in plain.items() if name not in _OF_EVERY_MODULE)
    containers, tensors = _held(own)
    contents = [(container, container.copy()) for container in containers]
    values = [(t, t.detach(), t.detach().clone()) for t in (*module.buffers(), *tensors) if not t.is_inference()]

    def restore() -> None:
        for part, plain, dictionaries in zip(parts, attributes, registered, strict=True):
            vars(part).clear()
            vars(part).update(plain)
            for held, entries in dictionaries:
                held.clear()
                held.update(entries)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)
        with torch.no_grad():
            for tensor, memory, value in values:
                put_back(tensor, memory, value)

    return restore


def put_back(tensor: Tensor, memory: Tensor, value: Tensor) -> None:
    """Give a tensor its memory, in which it may have been written, and the values there."""
    if tensor.layout != torch.strided:
        tensor.copy_(value)
        return
    if any(ask(tensor) != ask(memory) for ask in (Tensor.data_ptr, Tensor.size, Tensor.stride)):
        tensor.data = memory
    for axis, stride in enumerate(memory.stride()):
        if stride == 0 and memory.shape[axis] > 1:  # expanded: the same place again and again
            memory, value = memory.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    with suppress(RuntimeError):  # memory that overlaps in other ways cannot be written, by nobody
        memory.copy_(value)


def _held(items: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """Python's own containers that can be written to, among the items and inside them, and the tensors there."""
    containers: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}
    todo = list(items)
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            tensors[id(item)] = item
        elif type(item) in _CONTAINERS and id(item) not in containers:
            containers[id(item)] = item
            todo.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, tuple):
            todo.extend(item)
    return list(containers.values()), list(tensors.values())
