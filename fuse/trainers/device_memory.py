"""Whether a device can train a whole model."""

from __future__ import annotations

from transformers import PreTrainedModel

from fuse.config.memory import device_memory_bytes, host_memory_bytes
from fuse.config.run import RunConfig
from fuse.config.settings import num_devices

_TRAINED_BYTES = 16
"""Of a parameter: itself, its gradient and AdamW's two moments, in float32."""
_SHARE = 0.5
"""Of a device's memory: the rest is for an engine, activations, and models that score."""


def replicas_fit(model: PreTrainedModel, args: RunConfig) -> bool:
    """Whether every device has room to train all of `model`, which then needs no pipeline, and has no bubbles."""
    return model.num_parameters() * _TRAINED_BYTES <= _SHARE * _device_bytes(args)


def _device_bytes(args: RunConfig) -> float:
    return device_memory_bytes() if args.accelerator == "cuda" else host_memory_bytes() / num_devices(args)
