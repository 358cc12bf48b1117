"""Memory that this process has freed and its allocator keeps, all of it where `WORKER_ENVIRONMENT` has been set."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return freed memory to the system, wherever between what is in use it lies; glibc alone can, others keep less.

    What is taken again then comes page by page: half a second per GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
