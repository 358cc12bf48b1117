"""What the memory of runs of tiny models depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fuse.driver.memory_setup import MemorySetup, planned_models
from fuse.intrastage.placement import Replica
from fuse.training.model_spec import ModelSpec


def memory_setup(
    specs: Mapping[str, ModelSpec], placement: tuple[Replica, ...], num_devices: int, **options: Any
) -> MemorySetup:
    """Short samples in float32, on CPUs of a gigabyte, by halved backwards, but for `options`."""
    given: dict[str, Any] = {
        "device_memory_bytes": 10**9,
        "accelerator": "cpu",
        "prompt_tokens": 8,
        "response_tokens": 8,
        "micro_batch_size": 2,
        "num_micro_batches": 4,
        "autocast": None,
        "generation_dtype": torch.float32,
        "engine_batch_size": 4,
        "inference_batch_size": 4,
        "inference_batch_tokens": 64,
        **options,
    }
    models = planned_models(
        specs, autocast=None, gradient_checkpointing=False, split_backward=True, device=given["accelerator"]
    )
    return MemorySetup(models=models, placement=placement, num_devices=num_devices, **given)
