"""What the options of the steps are that TRL trains; here without what trains, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from trl import RewardConfig, SFTConfig

_OF_ADVANTAGES: Mapping[str, float] = MappingProxyType({"advantage_margin": 2.5, "expectation_coefficient": 1.0})
"""Options of loss='advantage', and their defaults."""


@dataclass
class RewardStepConfig(RewardConfig):
    """TRL's, and these."""

    loss: Literal["pairwise", "advantage"] = field(
        default="pairwise",
        metadata={
            "help": "What the model learns: to score the chosen response higher, or, as an Advantage Model, also how "
            "far responses are above or below what their prompt lets expect, within a margin."
        },
    )
    advantage_margin: float | None = field(
        default=None,
        metadata={"help": "Bound of scores, which loss='advantage' alone has (default: 2.5)."},
    )
    expectation_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the squared error of what is expected, which loss='advantage' alone has (default: 1.0)."
        },
    )
    square_coefficient: float = field(
        default=0.0,
        metadata={"help": "Weight of the squares of both rewards in the loss (ChatGLM-RLHF; its value is not known)."},
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Rank of LoRA adapters that train in place of weights, but the head's; saved merged."},
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Their scale (default: twice lora_r)."})
    length_buckets: int = field(
        default=10,
        metadata={
            "help": "Buckets of the pairs' difference of lengths, in each of which as many are kept whose longer "
            "response was chosen as whose shorter one was; 0 keeps all pairs."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_reward(self)
        for name, default in _OF_ADVANTAGES.items():
            if getattr(self, name) is None:
                setattr(self, name, default)


def check_reward(options: Any) -> None:
    """Look at values of `RewardStepConfig`, or of its fields by name.

    Raises: ValueError for one that is out of range, or without effect.
    """
    for name in ("square_coefficient", "length_buckets"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} is {getattr(options, name)}: it must be at least 0, which turns it off")
    if options.lora_r is not None and options.lora_r < 1:
        raise ValueError(f"lora_r is {options.lora_r}: it must be at least 1")
    if options.lora_r is not None and options.loss == "advantage":
        raise ValueError(f"lora_r={options.lora_r} with loss='advantage', whose head is new: leave one of them out")
    if options.lora_alpha is not None and options.lora_r is None:
        raise ValueError(f"lora_alpha={options.lora_alpha} without lora_r, by which there are adapters: give both")
    for name in _OF_ADVANTAGES:
        value = getattr(options, name)
        if value is not None and options.loss != "advantage":
            raise ValueError(f"{name}={value} with loss={options.loss!r}, which has none: leave it out")
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: it must be above 0")


CONFIGS: Mapping[str, Any] = MappingProxyType({"sft": SFTConfig, "reward": RewardStepConfig})
"""By the name of the step."""
CHECKS: Mapping[str, Callable[[Any], None]] = MappingProxyType({"reward": check_reward})
"""Of options by name, before anything is done."""
