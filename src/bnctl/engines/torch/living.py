"""Tensors by identity, for as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class LivingTensors:
    """A number for each tensor that is alive.

    As ``torch.utils.weak.WeakTensorKeyDictionary``, whose look-ups take ten times as long because it compares references. Here an ``id`` finds the entry,
    which goes when the tensor does.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._references: dict[int, _Reference] = {}
        self._over: dict[int, list[_Reference]] = {}
        self._forget_it = self._forget

    def get(self, tensor: Tensor) -> int | None:
        """The tensor's number; None for one that has none."""
        return self._numbers.get(id(tensor))

    def __setitem__(self, tensor: Tensor, number: int) -> None:
        key, storage = id(tensor), storage_of(tensor)
        self._numbers[key] = number
        reference = self._references.get(key)
        if reference is None:
            reference = self._references[key] = _Reference(tensor, self._forget_it)
        if storage is not None and storage != reference.storage:  # `set_` gives a tensor another one
            self._over.setdefault(storage, []).append(reference)
            reference.storage = storage

    def numbers(self) -> Iterator[tuple[int, int]]:
        """The ``id`` of each living tensor, and its number."""
        return iter(tuple(self._numbers.items()))

    def over(self, storage: int) -> list[Tensor]:
        """The living tensors over a storage, in the order in which they came."""
        references = self._over.get(storage, [])
        living = [(reference, tensor) for reference in references if (tensor := reference.tensor()) is not None]
        references[:] = [reference for reference, _ in living]
        return [tensor for _, tensor in living if storage_of(tensor) == storage]

    def _forget(self, reference: _Reference) -> None:
        del self._references[reference.key]
        del self._numbers[reference.key]


class _Reference(weakref.ref[Tensor]):
    """A weak reference that remembers whose it was, and under which storage it is filed."""

    __slots__ = ("key", "storage")

    key: int
    storage: int | None

    def __init__(self, tensor: Tensor, forget: Callable[[_Reference], None]) -> None:
        super().__init__(tensor, forget)  # type: ignore[call-arg]
        self.key = id(tensor)
        self.storage = None

    def tensor(self) -> Tensor | None:
        """The tensor, if it is alive; torch wants to be told where Python's half of a tensor is found by a weak reference."""
        tensor = self()
        if tensor is not None:
            tensor._fix_weakref()  # type: ignore[attr-defined]
        return tensor


def storage_of(tensor: Tensor) -> int | None:
    """What says whether two tensors share memory; None for a tensor without plain memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None
