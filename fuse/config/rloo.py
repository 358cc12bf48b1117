"""RLOOConfig: every option of an RLOO run, with TRL's names and defaults where TRL has the option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fuse.config.clip_range import clip_range
from fuse.config.option import option
from fuse.config.policy_gradient import PolicyGradientConfig, advantage_option, loss_option


@dataclass
class RLOOConfig(PolicyGradientConfig):
    """Arguments of `RLOOTrainer`: those of `PolicyGradientConfig` plus RLOO's own, as in TRL's RLOOConfig (trl 1.12).

    Source: Ahmadian et al. 2024 (arXiv 2402.14740).

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **PolicyGradientConfig.CHOICES,
        "loss": ("rloo", "proximal_rloo"),
    }
    OF_ADVANTAGES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **PolicyGradientConfig.OF_ADVANTAGES,
        "normalize_advantages": ("leave_one_out",),
        "reward_clip_range": ("leave_one_out",),
    }

    advantage: str = advantage_option("leave_one_out", "group", "leave_one_out", "grpovi")
    loss: str = loss_option("rloo", "rloo", "proximal_rloo")
    num_generations: int = option(2, "Responses to every prompt, which are compared with one another.")
    beta: float = option(0.05, "Weight of the KL penalty in the reward. 0: there is no reference model.")
    normalize_advantages: bool = option(False, "Scale advantages to mean 0 and deviation 1 over the batch.")
    reward_clip_range: list[float] | None = option(None, "Bounds of rewards, before the KL penalty.")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self.reward_clip_range = clip_range(self.reward_clip_range)
