"""Whether engines can share devices as a run's options say."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PretrainedConfig

from fuse.config.run import RunConfig

_logger = logging.getLogger(__name__)


def check_generation(config: RunConfig, num_devices: int, actor: PretrainedConfig) -> None:
    """Raises: ValueError for engines over several devices that these, the engine or the actor do not allow."""
    size = config.generation_tensor_parallel_size
    if size == 1:
        return
    given = f"generation_tensor_parallel_size={size}"
    if config.engine != "vllm":
        raise ValueError(
            f"{given} with engine={config.engine!r}, whose matrices are whole: set engine='vllm', or leave it at 1"
        )
    if num_devices % size:
        raise ValueError(f"{given} does not divide num_devices={num_devices}: choose a divisor")
    text: Any = actor.get_text_config()
    if text.num_attention_heads % size:
        raise ValueError(
            f"{given} does not divide the policy's {text.num_attention_heads} attention heads: choose a divisor"
        )
    if config.kv_transfer != "object_store":
        raise ValueError(
            f"{given} with kv_transfer={config.kv_transfer!r}, though the KV of an engine over several devices stays "
            "where it is: leave kv_transfer out"
        )
    _logger.info("engines over several devices: samples that move take their tokens alone, and are computed again")
