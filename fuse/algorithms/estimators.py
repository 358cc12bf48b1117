"""Estimators of advantages without a critic, by name, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fuse.algorithms.group_advantages import Aggregation, Scale, group_advantages, weighted_sum
from fuse.algorithms.group_batch import GroupSettings, Scored
from fuse.algorithms.grpovi import increase_variance
from fuse.algorithms.leave_one_out import deviations_of_groups, leave_one_out
from fuse.algorithms.reinforce_plus_plus import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorSettings:
    """What estimators go by; each takes of it what concerns it.

    group: what is compared. beta: weight of the KL penalty, where an estimator has that in the reward.
    reward_range: that rewards are clipped to, before it. scale, aggregation: see `group_advantages`.
    normalizes: whether leave-one-out advantages are whitened. gamma: REINFORCE++'s discount, by token.
    """

    group: GroupSettings
    beta: float = 0.0
    reward_range: tuple[float, float] | None = None
    scale: Scale = "group"
    aggregation: Aggregation = "sum_then_normalize"
    normalizes: bool = False
    gamma: float = 1.0

    @property
    def weights(self) -> Tensor:
        """Of the reward functions, and of penalties."""
        return torch.tensor(self.group.all_weights)

    def total(self, scored: Scored) -> Tensor:
        """Rewards [samples]."""
        return weighted_sum(scored.rewards, self.weights)


Estimate = Callable[[Scored, EstimatorSettings], tuple[Tensor, Tensor]]
"""A rollout -> advantages [tokens] and the deviations [samples] of the rewards that each was compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """least_generations: responses to a prompt that it needs.

    penalizes: whether it has the KL penalty in the reward; else that is the loss's. by_token: whether the tokens of a
    response may have different advantages. needs_reference: even without a penalty.
    within_groups: whether, with these settings, an advantage needs no sample of another group.
    """

    estimate: Estimate
    least_generations: int = 2
    penalizes: bool = False
    by_token: bool = False
    needs_reference: bool = False
    within_groups: Callable[[EstimatorSettings], bool] = lambda settings: False


def _scales_within_groups(settings: EstimatorSettings) -> bool:
    return settings.scale != "batch" and settings.aggregation == "sum_then_normalize"


def _group(scored: Scored, settings: EstimatorSettings) -> tuple[Tensor, Tensor]:
    advantages, deviations = group_advantages(
        scored.rewards,
        settings.weights,
        num_generations=settings.group.num_generations,
        scale=settings.scale,
        aggregation=settings.aggregation,
    )
    return scored.by_token(advantages), deviations


def _leave_one_out(scored: Scored, settings: EstimatorSettings) -> tuple[Tensor, Tensor]:
    rewards = settings.total(scored)
    if settings.reward_range is not None:
        rewards = rewards.clamp(*settings.reward_range)
    advantages, deviations = leave_one_out(
        rewards - settings.beta * scored.kl,
        num_generations=settings.group.num_generations,
        normalize=settings.normalizes,
    )
    return scored.by_token(advantages), deviations


def _reinforce_plus_plus(scored: Scored, settings: EstimatorSettings) -> tuple[Tensor, Tensor]:
    rewards = settings.total(scored)
    advantages = reinforce_plus_plus_advantages(
        rewards,
        scored.token_kl,
        scored.token_offsets,
        kl_coef=settings.beta,
        gamma=settings.gamma,
        clip_range=settings.reward_range,
    )
    return advantages, deviations_of_groups(rewards, len(rewards))


def _reinforce_plus_plus_baseline(scored: Scored, settings: EstimatorSettings) -> tuple[Tensor, Tensor]:
    rewards, num_generations = settings.total(scored), settings.group.num_generations
    advantages = reinforce_plus_plus_baseline_advantages(
        rewards,
        scored.token_kl,
        scored.token_offsets,
        num_generations,
        kl_coef=settings.beta,
        clip_range=settings.reward_range,
    )
    return advantages, deviations_of_groups(rewards, num_generations)


def _grpovi(scored: Scored, settings: EstimatorSettings) -> tuple[Tensor, Tensor]:
    num_generations = settings.group.num_generations
    rewards = increase_variance(settings.total(scored), scored.reference_logprobs, num_generations)
    advantages, deviations = group_advantages(
        rewards[:, None],
        torch.ones(1),
        num_generations=num_generations,
        scale=settings.scale,
        aggregation="sum_then_normalize",
    )
    return scored.by_token(advantages), deviations


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "group": Estimator(estimate=_group, within_groups=_scales_within_groups),  # GRPO, arXiv 2402.03300
        "leave_one_out": Estimator(  # RLOO, arXiv 2402.14740
            estimate=_leave_one_out, penalizes=True, within_groups=lambda settings: not settings.normalizes
        ),
        "reinforce++": Estimator(  # arXiv 2501.03262
            estimate=_reinforce_plus_plus, least_generations=1, penalizes=True, by_token=True
        ),
        "reinforce++-baseline": Estimator(  # arXiv 2501.03262
            estimate=_reinforce_plus_plus_baseline, penalizes=True, by_token=True
        ),
        "grpovi": Estimator(  # arXiv 2505.23247
            estimate=_grpovi, needs_reference=True, within_groups=lambda settings: settings.scale != "batch"
        ),
    }
)
