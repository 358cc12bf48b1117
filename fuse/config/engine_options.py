"""Options that only one of the engines has."""

from __future__ import annotations


def check_engine_options(engine: str, accelerator: str, *, cache_bytes: int | None, cuda_graphs: bool) -> None:
    """Raises: ValueError where the engine asked for does not have them."""
    if cache_bytes is not None and engine != "vllm":
        raise ValueError(
            f"generation_cache_bytes={cache_bytes} with engine={engine!r}, whose cache grows as needed: set "
            "engine='vllm', or leave it out"
        )
    if cuda_graphs and (engine != "transformers" or accelerator != "cuda"):
        raise ValueError(
            f"generation_cuda_graphs=True with engine={engine!r} on {accelerator}: it is of the transformers engine on "
            "GPUs; leave it out"
        )
