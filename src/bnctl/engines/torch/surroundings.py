"""What surrounds a recorded pass: settings of torch and of Python that are put back after it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def young_objects_only() -> Iterator[None]:
    """Let garbage collection look at nothing that was there before: the pass is searched for tensors in dead cycles, not the whole process."""
    if gc.get_freeze_count():  # somebody else's; to unfreeze would undo it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Keep torch from computing a whole transformer layer in one fused operator, in which no layer can be seen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def values_read(note: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell of every tensor whose values Python takes without an operator: by ``tolist``, ``numpy`` and what rests on it."""

    def watched(name: str) -> Any:
        method = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            note(tensor)
            return method(tensor, *args, **kwargs)

        return read

    names = ("numpy", "tolist")
    before = {name: vars(Tensor).get(name) for name in names}
    for name in names:
        setattr(Tensor, name, watched(name))
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, method)
