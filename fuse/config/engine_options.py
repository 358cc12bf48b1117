"""Options that only one of the engines has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fuse.config.run import RunConfig


@dataclass
class EngineOptions:
    """A part of `RunConfig`."""

    speculation: Literal["auto", "off", "int8", "ngram"] = field(
        default="off",
        metadata={
            "help": "Draft tokens that the transformers engine verifies several at a time, as many as pay: 'int8' by "
            "the policy itself with such weights, on CPUs; 'ngram' by the texts of the prompt; 'auto' by the better of "
            "these. Tokens are the same; log-probabilities to rounding, which then depends on times."
        },
    )


def check_engine_options(config: RunConfig) -> None:
    """Raises: ValueError where the engine asked for does not have them."""
    engine, cache_bytes = config.engine, config.generation_cache_bytes
    if cache_bytes is not None and engine != "vllm":
        raise ValueError(
            f"generation_cache_bytes={cache_bytes} with engine={engine!r}, whose cache grows as needed: set "
            "engine='vllm', or leave it out"
        )
    if config.generation_cuda_graphs and (engine != "transformers" or config.accelerator != "cuda"):
        raise ValueError(
            f"generation_cuda_graphs=True with engine={engine!r} on {config.accelerator}: it is of the transformers "
            "engine on GPUs; leave it out"
        )
    if config.speculation != "off" and engine != "transformers":
        raise ValueError(
            f"speculation={config.speculation!r} with engine={engine!r}, whose own drafts would change which tokens "
            "are sampled: set engine='transformers', or leave it out"
        )
    if config.speculation == "int8" and config.accelerator == "cuda":
        raise ValueError(
            "speculation='int8' on cuda, where there is no code for its products: use 'ngram', or leave it out"
        )
