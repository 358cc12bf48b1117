"""ReinforcePlusPlusConfig: every option of a REINFORCE++ run, with defaults as OpenRLHF 0.11 has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fuse.config.clip_range import clip_range
from fuse.config.grpo_loss import GRPOLossConfig
from fuse.config.option import option
from fuse.config.policy_gradient import advantage_option, loss_option


@dataclass
class ReinforcePlusPlusConfig(GRPOLossConfig):
    """Arguments of `ReinforcePlusPlusTrainer`: those of `GRPOLossConfig` plus REINFORCE++'s own.

    The KL penalty is in the reward of every token, and advantages are returns, whitened over all tokens of a rollout.

    Source: Hu et al. 2025 (arXiv 2501.03262).

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **GRPOLossConfig.CHOICES,
        "advantage": ("reinforce++", "reinforce++-baseline"),
        "loss": ("grpo",),
    }
    OF_ADVANTAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **GRPOLossConfig.OF_ADVANTAGES,
        "gamma": ("reinforce++",),
    }

    advantage: str = advantage_option("reinforce++", "reinforce++", "reinforce++-baseline")
    loss: str = loss_option("grpo", "grpo")
    num_generations: int = option(1, "Responses to every prompt.")
    beta: float = option(0.01, "Weight of the KL penalty in the reward of a token. 0: there is no reference model.")
    gamma: float = option(1.0, "Discount of the rewards of later tokens.")
    reward_clip_range: list[float] | None = option(
        (-10.0, 10.0), "Bounds of rewards, less the mean of their group for 'reinforce++-baseline', before the penalty."
    )

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self.reward_clip_range = clip_range(self.reward_clip_range)
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} must lie between 0 and 1, or be 1 for no discount")
