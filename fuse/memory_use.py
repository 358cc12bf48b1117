"""How much memory a worker's process holds on its device."""

from __future__ import annotations

import os
import sys
from typing import Any

from fuse.trace import Span, now_s

USAGE = "usage"
"""The category of spans that tell of memory."""
_STATM = "/proc/self/statm"


def used_bytes() -> int | None:
    """On a GPU, the most that torch's allocator has reserved in this process; else resident memory that is its own.

    Shared memory is left out: it is the host's, once. None where the system does not tell.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    try:
        with open(_STATM, encoding="ascii") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:  # not Linux
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def usage_spans() -> list[Span]:
    """A span of no duration that tells what is held now; none where that is not known."""
    held, moment_s = used_bytes(), now_s()
    return [] if held is None else [Span("memory", USAGE, moment_s, moment_s, {"bytes": held})]
