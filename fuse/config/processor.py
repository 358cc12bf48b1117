"""What this machine's CPU can do."""

from __future__ import annotations

from pathlib import Path


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not known to be slow
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))
