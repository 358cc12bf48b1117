"""RLOO: the other responses to a prompt as a baseline, the KL penalty in the reward, and no critic.

Source: Ahmadian et al. 2024 (arXiv 2402.14740).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.group_advantages import weighted_sum
from fuse.algorithms.group_batch import GroupSettings, GroupTargets, Scored, estimate
from fuse.algorithms.leave_one_out import leave_one_out
from fuse.algorithms.rloo_loss import rloo_loss
from fuse.sample import SpecialTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RLOOSettings:
    """group: what is compared. beta: weight of the KL penalty. reward_range: that rewards are clipped to, before it.

    temperature, num_tokens: of sampling. epsilon_*: see `rloo_loss`.
    """

    group: GroupSettings
    beta: float
    reward_range: tuple[float, float] | None
    normalizes_advantages: bool
    temperature: float
    epsilon_low: float
    epsilon_high: float
    num_tokens: int | None = None


def rloo(settings: RLOOSettings, special: SpecialTokens) -> Algorithm:
    """RLOO with these settings, on responses that these tokens end."""
    group = settings.group

    def advantages_of(scored: Scored) -> tuple[Tensor, Tensor]:
        rewards = weighted_sum(scored.rewards, torch.tensor(group.reward_weights))
        if settings.reward_range is not None:
            rewards = rewards.clamp(*settings.reward_range)
        return leave_one_out(
            rewards - settings.beta * scored.kl,
            num_generations=group.num_generations,
            normalize=settings.normalizes_advantages,
        )

    loss = partial(
        rloo_loss,
        temperature=settings.temperature,
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        num_tokens=settings.num_tokens,
    )
    return Algorithm(
        estimate=partial(estimate, settings=group, advantages_of=advantages_of, special=special),
        losses={"actor": loss},
        targets={"actor": GroupTargets},
    )
