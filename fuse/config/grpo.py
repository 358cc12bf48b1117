"""GRPOConfig: every option of a GRPO run, with TRL's names and defaults where TRL has the option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fuse.config.grpo_loss import GRPOLossConfig
from fuse.config.option import option


@dataclass
class GRPOConfig(GRPOLossConfig):
    """Arguments of `GRPOTrainer`: those of `GRPOLossConfig` plus GRPO's own, as TRL's GRPOConfig has them (trl 1.12).

    Source: Shao et al. 2024 (arXiv 2402.03300).

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **GRPOLossConfig.CHOICES,
        "scale_rewards": ("group", "batch", "none"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    }
    OF_ADVANTAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **GRPOLossConfig.OF_ADVANTAGES,
        "scale_rewards": ("group", "grpovi"),
        "multi_objective_aggregation": ("group",),
    }

    scale_rewards: str = option(
        "group", "What advantages are divided by: the deviation of the 'group', of the 'batch', or 'none'."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize", "Whether rewards of several functions are added before or after they are normalised."
    )

    def __post_init__(self) -> None:
        words: Mapping[Any, str] = {True: "group", False: "none", "true": "group", "false": "none"}
        self.scale_rewards = words.get(self.scale_rewards, self.scale_rewards)
        super().__post_init__()
