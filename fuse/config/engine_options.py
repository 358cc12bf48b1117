"""Options that only one of the engines has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EngineOptions:
    """A part of `RunConfig`."""

    speculation: Literal["auto", "off", "int8", "int4", "ngram"] = field(
        default="off",
        metadata={
            "help": "Draft tokens that the transformers engine verifies several at a time, as many as pay: 'int8' "
            "and 'int4' by the policy itself with such weights; 'ngram' by the texts of the prompt; 'auto' by 'int8' "
            "where native code has the model, else by 'ngram'. "
            "Tokens are the same; log-probabilities to rounding, which then depends on times."
        },
    )

    def check_engine_options(
        self, engine: str, accelerator: str, *, cache_bytes: int | None, cuda_graphs: bool
    ) -> None:
        """Raises: ValueError where the engine asked for does not have them, or nothing has."""
        speculation = self.speculation
        if speculation not in ("auto", "off", "int8", "int4", "ngram"):
            raise ValueError(f"speculation={speculation!r} is unknown: use 'auto', 'off', 'int8', 'int4' or 'ngram'")
        if cache_bytes is not None and engine != "vllm":
            raise ValueError(
                f"generation_cache_bytes={cache_bytes} with engine={engine!r}, whose cache grows as needed: set "
                "engine='vllm', or leave it out"
            )
        if cuda_graphs and (engine != "transformers" or accelerator != "cuda"):
            raise ValueError(
                f"generation_cuda_graphs=True with engine={engine!r} on {accelerator}: it is of the transformers "
                "engine on GPUs; leave it out"
            )
        if speculation != "off" and engine != "transformers":
            raise ValueError(
                f"speculation={speculation!r} with engine={engine!r}, whose own drafts would change which tokens "
                "are sampled: set engine='transformers', or leave it out"
            )
