"""Tensors in whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings, dataclasses and plain objects, in order, each once."""
    if isinstance(tree, Tensor):
        return [tree]
    found: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}  # held, so that no id is given to another object
    todo = [tree]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.setdefault(id(item), item)
        elif id(item) not in seen and not isinstance(item, _WITHOUT_TENSORS):
            seen[id(item)] = item
            todo.extend(reversed(list(_children(item))))
    return list(found.values())


_WITHOUT_TENSORS = (str, bytes, int, float, bool, type(None), nn.Module, type)


def _children(item: Any) -> Iterator[Any]:
    if isinstance(item, (tuple, list, set, frozenset)):
        yield from item
    elif isinstance(item, Mapping):
        yield from item.values()
    elif is_dataclass(item):
        yield from (getattr(item, f.name) for f in fields(item))
    elif hasattr(item, "__dict__"):
        yield from vars(item).values()
