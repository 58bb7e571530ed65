"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_SHARE = 0.5
"""Share of the memory that is free at the start which recalibration may hold."""


def available_bytes() -> int:
    """Memory that could be taken now without swapping: of the machine, or of the control group that the process is in."""
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
