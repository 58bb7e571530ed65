"""How much memory a paused forward pass holds, and how much there is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEFAULT_SHARE = 0.5
"""Share of the memory that is free at the start which paused forward passes may hold."""


class LiveStorages(TorchDispatchMode):
    """Knows which storages that were made under it are still alive.

    Args:
        known: tensors from before, such as inputs and parameters: views of them are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
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
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(size for size in (_machine_bytes(), _group_bytes()) if size is not None)


def _machine_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # elsewhere: half of what is built in


def _group_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit (control groups, version 2) leaves; None where there is none."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = (group / "memory.current").read_text(encoding="ascii")
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
