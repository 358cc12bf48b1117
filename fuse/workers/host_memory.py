"""Memory that this process has freed and its allocator keeps, all of it where `WORKER_ENVIRONMENT` has been set."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from fuse.memory_use import used_bytes

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_PLENTY = 16


def give_back_if_scarce() -> None:
    """`give_back`, unless the host has room for several times what this process holds, for every core of it."""
    held, available = used_bytes(), available_bytes()
    if held is None or available is None or available < _PLENTY * (os.cpu_count() or 1) * held:
        give_back()


def give_back() -> None:
    """Return freed memory to the system, wherever between what is in use it lies; glibc alone can, others keep less.

    What is taken again then comes page by page: half a second per GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """That processes can still take of this host, or of the container; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return None
    try:
        limit, current = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # of the whole host, or cgroups of the first version
        return available
    return available if limit == "max" else min(available, int(limit) - int(current))
