"""What the options of the steps are that TRL trains; here without what trains, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from trl import RewardConfig, SFTConfig


@dataclass
class RewardStepConfig(RewardConfig):
    """TRL's, and these."""

    square_coefficient: float = field(
        default=0.0,
        metadata={"help": "Weight of the squares of both rewards in the loss (ChatGLM-RLHF; its value is not known)."},
    )
    length_buckets: int = field(
        default=10,
        metadata={
            "help": "Buckets of the pairs' difference of lengths, in each of which as many are kept whose longer "
            "response was chosen as whose shorter one was; 0 keeps all pairs."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("square_coefficient", "length_buckets"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0, which turns it off")


CONFIGS: Mapping[str, Any] = MappingProxyType({"sft": SFTConfig, "reward": RewardStepConfig})
"""By the name of the step."""
