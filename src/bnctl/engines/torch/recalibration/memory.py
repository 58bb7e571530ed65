"""How much memory a paused forward pass holds, and how much there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnctl.engines.torch.recalibration.twins import place_of
from bnctl.recalibration import memory
from bnctl.recalibration.memory import DEFAULT_SHARE, _group_bytes, _machine_bytes

__all__ = ["DEFAULT_SHARE", "LiveStorages", "_group_bytes", "_machine_bytes", "available_bytes"]


class LiveStorages(TorchDispatchMode):
    """Knows which storages that were made under it are still alive.

    Args:
        known: tensors from before, such as inputs and parameters: views of them are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {place_of(tensor) for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and place_of(tensor) > 0:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def size_bytes(self) -> int:
        """Bytes of the storages that are still alive."""
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        return sum(size for _, size in self._alive.values())


def available_bytes(device: torch.device) -> int:
    """Memory that could be taken now without swapping: of the device, or of the machine and its control group."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else memory.available_bytes()
