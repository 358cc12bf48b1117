"""How vLLM runs on its kind of device: what it captures, and whose memory it sleeps with."""

from __future__ import annotations

from typing import Any


def device_options(is_cpu: bool) -> dict[str, Any]:
    """Options of vLLM's `EngineArgs`; those for GPUs have not been run.

    On GPUs decode steps are captured as CUDA graphs, whole, at the batch sizes that vLLM chooses up to the most samples
    it runs: of a step of a small batch, launching its kernels takes most of the time. The kernels are those of the
    model as it is written: torch.compile would take a minute to start, and round differently from the trainer. Samples
    that enter are prefilled uncaptured. The connector moves KV before a step, outside of what is captured.

    Captured graphs know weights and cache by their addresses, so memory that sleeps must come back where it was: that
    is what vLLM's own allocator does (`enable_sleep_mode`).
    """
    if is_cpu:
        return {"enforce_eager": True}
    return {
        "enforce_eager": False,
        "compilation_config": {"mode": "NONE", "cudagraph_mode": "FULL_DECODE_ONLY"},
        "enable_sleep_mode": True,
    }
