"""What this machine's CPU can do."""

from __future__ import annotations

import logging
from pathlib import Path

_logger = logging.getLogger(__name__)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not known to be slow
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))


def warn_of_bfloat16() -> None:
    """Log that bfloat16 is slow here, where it is."""
    if not multiplies_bfloat16():
        _logger.warning(
            "bf16=True on a CPU without bfloat16 arithmetic (AVX-512 BF16 or AMX), slower than float32 there: leave it "
            "out"
        )
