"""Copies of a model's structure over the same parameters and buffers, but for those that it writes to."""

from __future__ import annotations

import gc
import io
import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bnctl.engines.torch.copies import copied


class Twins:
    """Lends a twin to each forward pass that runs, and takes it back.

    Args:
        model: what they are copies of. It is not lent itself: a copy of a model that runs would be of any state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.give_own(())

    def give_own(self, places: Collection[int]) -> None:
        """Give each forward pass its own copy of the parameters and buffers in some storages (:func:`place_of`): those that the model writes to, a cache or a
        counter. Forward passes that take turns would read what another one wrote; this way each begins with what the model holds.
        """
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._shared = [tensor for tensor in tensors if place_of(tensor) not in places]
        self._places = {place_of(tensor) for tensor in self._shared}
        self._own = bool(places)
        # a deep copy keeps what shares a storage together
        self._pickled = None if places else _pickled(self._model, self._shared)
        self._free: list[nn.Module] = []

    def shares(self, place: int) -> bool:
        """Whether a storage belongs to all twins."""
        return place in self._places

    @contextmanager
    def one(self) -> Iterator[nn.Module]:
        """A model that nobody else uses until the context ends."""
        try:
            twin = self._free.pop()
        except IndexError:
            twin = self._made()
        try:
            yield twin
        finally:
            if not self._own:
                self._free.append(twin)

    def _made(self) -> nn.Module:
        if self._pickled is None:
            return copied(self._model, type(self._model).__name__, self._shared)
        with _without_collector():
            twin: nn.Module = _Unpickler(io.BytesIO(self._pickled), self._shared).load()
        return twin


def place_of(tensor: torch.Tensor) -> int:
    """The storage that a tensor lies in, or the tensor itself where it has no memory."""
    try:
        return tensor.untyped_storage().data_ptr() or -id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and those that are made of others
        return -id(tensor)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python looks for garbage whenever many objects are made, in all that there are: twins took ten times as long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _pickled(model: nn.Module, shared: list[torch.Tensor]) -> bytes | None:
    """The structure, from which twins are made ten times faster than by deep copies; None where it cannot be pickled, or is copied in a way of its own."""
    if any(hasattr(module, "__deepcopy__") for module in model.modules()):
        return None
    file = io.BytesIO()
    try:
        _Pickler(file, shared).dump(model)
    except Exception:  # lambdas, local classes, parametrised modules: each has its own way to refuse
        return None
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Writes the number of a shared tensor in its place."""

    def __init__(self, file: io.BytesIO, shared: list[torch.Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._numbers = {id(tensor): number for number, tensor in enumerate(shared)}

    def persistent_id(self, value: Any) -> int | None:
        return self._numbers.get(id(value)) if isinstance(value, torch.Tensor) else None


class _Unpickler(pickle.Unpickler):
    """Puts the shared tensors back; reads nothing but what this process wrote."""

    def __init__(self, file: io.BytesIO, shared: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, number: int) -> torch.Tensor:
        return self._shared[number]
